"""One command from nothing: where runs lie, and the student that a method starts from.

Distribution methods move a student that makes pictures already. Asked for `dmd2` alone, `with_start` looks for one in
its usual folder, `runs/<teacher>-1step` or `runs/<teacher>-flow-map`, goes on with it if it was interrupted, and makes
it by its own preset if it is not there. It is made with the teacher's own guidance scale, as it would be by itself; the
scale that was asked for enters with the method that follows.

What lies in the usual folder is used only if it is what would be made: of this teacher, by this plan, with this budget.
A student of some classes, or of two updates made for a try, is refused; `start=` takes it knowingly.
"""

from dataclasses import asdict, replace
from pathlib import Path

from diffusion_opt.datasets import read_json
from diffusion_opt.distillation.make import PIPELINE, make_student
from diffusion_opt.distillation.methods import PAIRS, method_named
from diffusion_opt.distillation.plan import StudentPlan
from diffusion_opt.distillation.record import RECORD, as_json, check
from diffusion_opt.distillation.trajectory.pairs import MANIFEST
from diffusion_opt.flow import ALL_TIMES
from diffusion_opt.subjects import ClassConditional, Subject
from diffusion_opt.subjects.subject import same_source
from diffusion_opt.training import TrainConfig, processes


def usual_folder(plan: StudentPlan, runs: Path, subject: Subject | None = None) -> Path:
    """`<teacher>-<steps>step[-<method>]`, or `<teacher>-<method>` for a student of any number of steps; both with the
    guidance scale behind if it is not the teacher's own, and the settings of the method that are changed.
    """
    method = method_named(plan.method)
    name = plan.method.replace("_", "-")
    parts = [teacher_name(plan)]
    if method.sampling not in ("any", "renoise"):
        parts.append(f"{plan.steps}step")
    if plan.method != "ode":
        parts.append(name)
    own = [f"{name}={value}".replace(" ", "") for name, value in plan.method_settings.items()]
    return runs / "-".join([*parts, *_scale(plan, subject), *own])


def pairs_folder(plan: StudentPlan, runs: Path, subject: Subject | None = None) -> Path:
    """Where the trajectories of the plan's teacher lie, shared by its students; named after what is not usual.

    If the folder of that name holds those of another teacher, the name also says which model this one is.
    """
    subject = subject or ClassConditional.open(plan.teacher)
    config = plan.settled(subject).pair_config
    number = [] if config.num_pairs == PAIRS.num_pairs else [f"n{config.num_pairs}"]
    seed = [] if config.seed == PAIRS.seed else [f"seed{config.seed}"]
    folder = runs / "-".join([teacher_name(plan), "pairs", *_scale(plan, subject), *number, *seed])
    if (folder / MANIFEST).is_file():
        manifest, now = (
            read_json(folder / MANIFEST, "delete the folder to make the trajectories anew"),
            subject.identity(),
        )
        if not same_source(manifest.get("source"), now):
            return folder.with_name(f"{folder.name}-{now['model'][:8]}")
    return folder


def teacher_name(plan: StudentPlan) -> str:
    """The last part of the teacher's name; of a folder `…/<run>/pipeline`, as training leaves it, that of the run."""
    path = Path(plan.teacher)
    return path.parent.name if path.name == PIPELINE and path.parent.name else path.name


def _scale(plan: StudentPlan, subject: Subject | None) -> list[str]:
    low, high = plan.guidance_interval
    scale = []
    if plan.guidance is not None and method_named(plan.method).guided:
        own = (subject or ClassConditional.open(plan.teacher)).default_guidance
        scale = [] if plan.guidance == own else [f"g{plan.guidance:g}"]
    interval = [] if plan.guidance_interval == ALL_TIMES else [f"t{low:g}to{high:g}"]
    return scale + interval


def with_start(
    plan: StudentPlan,
    runs: Path,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
    subject: Subject | None = None,
) -> tuple[StudentPlan, bool]:
    """The plan with its start named, and whether that start is finished (False: interrupted just now).

    Raises ValueError if the usual folder of the start holds another student than the one that would be made.
    """
    subject = subject or ClassConditional.open(plan.teacher, device)
    starts = method_named(plan.method).starts
    if starts is None or plan.start is not None or not subject.needs_start:
        return plan, True
    name = starts[plan.steps]
    steps = plan.steps if plan.steps in method_named(name).presets else 1
    first = StudentPlan(plan.teacher, name, steps).settled(subject)
    folder = usual_folder(first, runs, subject)
    started = replace(plan, start=str(folder / PIPELINE))
    config: TrainConfig = replace(method_named(name).presets[steps], seed=seed)
    if is_finished(folder):
        check_start(folder, first, config, subject)
        return started, True
    if processes().is_main:
        print(f"{plan.method} starts from a student; first {name}, {config.minutes:g} minutes, in {folder}")
    pairs = pairs_folder(first, runs, subject)
    _, result = make_student(first, config, folder, pairs, device, progress, subject=subject)
    return started, result.finished


def check_start(folder: Path, plan: StudentPlan, config: TrainConfig, subject: Subject) -> None:
    """Raises ValueError unless the finished student of `folder` is what this plan and budget would make."""
    remedy = f"to start from it all the same, name it: --start {folder / PIPELINE}; else move it away"
    if not (folder / RECORD).is_file():
        raise ValueError(f"{folder} holds a pipeline without {RECORD}, so it cannot be told what it is; {remedy}")
    try:
        check(folder, as_json({**asdict(plan), "teacher_identity": dict(subject.identity()), "start_identity": None}))
    except ValueError as error:
        raise ValueError(f"this is not the start that the method needs: {error}; {remedy}") from error
    found = read_json(folder / RECORD, remedy).get("training", {})
    for key, value in as_json(asdict(config)).items():
        if key not in ("seed", "checkpoint_seconds", "log_every", "clock") and found.get(key) != value:
            raise ValueError(
                f"{folder} holds a student trained with {key}={found.get(key)}, its own preset says {value}; {remedy}"
            )


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a student whose training came to its end (or one that came without its record)."""
    if not (folder / PIPELINE / "model_index.json").is_file():
        return False
    if not (folder / RECORD).is_file():
        return True
    return bool(read_json(folder / RECORD, "delete the folder to make the student anew").get("finished", False))
