"""When may it be said that a student is at its teacher's quality? When judges that can contradict each other agree.

The distance of a judge is first lowered by what real pictures get at the same sample count, since that part is not the
model's. A student is at its teacher's quality if for each judge with a distance

    (student's - real's) <= tolerance x (teacher's - real's),      recall >= 0.9 of the teacher's,

and, where plain statistics were measured, each is as near to 1 as the teacher's or within 5 % of 1. One judge alone is
refused, because a 1-step student with visible grain passed the judge that was trained on its data.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from diffusion_opt.evaluation.judges.judge import Number, ratio

TOLERANCE, RECALL, DETAIL = 1.15, 0.9, 0.05


@dataclass(frozen=True, slots=True)
class Claim:
    """Whether a student is at its teacher's quality, and every comparison behind it."""

    holds: bool
    reasons: tuple[str, ...]  # one line a comparison, the failed ones marked "not"

    def __str__(self) -> str:
        verdict = "at the teacher's quality" if self.holds else "not at the teacher's quality"
        return "\n".join((verdict, *(f"  {reason}" for reason in self.reasons)))


def at_teacher_quality(
    student: Mapping[str, Number], teacher: Mapping[str, Number], tolerance: float = TOLERANCE
) -> Claim:
    """Weigh the numbers of two pipelines, as `judged` or `Measurement.judged` give them.

    Raises ValueError with fewer than two judges that measure a distance, with only such as were trained on the data,
    and for numbers that were measured differently.
    """
    judges = [name.removesuffix(".distance") for name in student if name.endswith(".distance") and name in teacher]
    if len(judges) < 2 or "imagenet" not in judges:
        raise ValueError(
            "the teacher's quality takes two judges with a distance to real pictures, one of them 'imagenet', which "
            f"was not trained here; got {', '.join(judges) or 'none'}: measure with judges=('fashion', 'imagenet')"
        )
    checks = []
    for judge in judges:
        mine, theirs = student[f"{judge}.distance"], teacher[f"{judge}.distance"]
        ratio(mine, theirs)  # refuses what was measured differently
        share = mine.above_real / theirs.above_real
        checks.append((share <= tolerance, f"{judge} distance above real pictures: {share:.2f} of the teacher's"))
        share = ratio(student[f"{judge}.recall"], teacher[f"{judge}.recall"])
        checks.append((share >= RECALL, f"{judge} recall: {share:.2f} of the teacher's"))
    for name in (name for name in student if name.startswith("statistics.") and name in teacher):
        mine, theirs = abs(student[name].value - 1), abs(teacher[name].value - 1)
        line = f"{name}: {student[name].value:.3f}, teacher {teacher[name].value:.3f}"
        checks.append((mine <= max(DETAIL, theirs), line))
    return Claim(all(passed for passed, _ in checks), tuple(line if ok else f"not: {line}" for ok, line in checks))
