"""Judges of generated pictures: chosen by name, several in one run, each number named after its judge."""

from diffusion_opt.evaluation.judges.claim import Claim, at_teacher_quality
from diffusion_opt.evaluation.judges.clips import ClipsJudge
from diffusion_opt.evaluation.judges.fashion import FashionJudge
from diffusion_opt.evaluation.judges.imagenet import ImageNetJudge
from diffusion_opt.evaluation.judges.judge import Judge, Number, ratio
from diffusion_opt.evaluation.judges.named import JUDGES, judge_named, judged, register
from diffusion_opt.evaluation.judges.own import Own
from diffusion_opt.evaluation.judges.paired import PairedJudge
from diffusion_opt.evaluation.judges.portraits import PortraitsJudge
from diffusion_opt.evaluation.judges.real import RealPictures
from diffusion_opt.evaluation.judges.statistics import StatisticsJudge

__all__ = [
    "JUDGES",
    "Claim",
    "ClipsJudge",
    "FashionJudge",
    "ImageNetJudge",
    "Judge",
    "Number",
    "Own",
    "PairedJudge",
    "PortraitsJudge",
    "RealPictures",
    "StatisticsJudge",
    "at_teacher_quality",
    "judge_named",
    "judged",
    "ratio",
    "register",
]
