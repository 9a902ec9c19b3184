"""What a calibration was made for: the model and the run, so that it can refuse to serve others.

Curves, ratios and tables hold for one set of weights under one scheduler, time grid and guidance scale. Published ones
travel without that knowledge, and a wrong one fails silently: it skips too much or never. So everything that is
calibrated here is saved with a `CalibratedRun`, which is compared with the pipeline twice: the model when a technique
is applied, the rest when a generation begins.
"""

from dataclasses import dataclass

from diffusers import DiffusionPipeline

from diffusion_opt.models.fingerprint import fingerprint

TIMESTEP_TOLERANCE = 0.05  # of 1,000: far below a step of any grid, above rounding


@dataclass(frozen=True, slots=True)
class CalibratedRun:
    """The model, scheduler, time grid and guidance scale of a calibration."""

    model: str  # `fingerprint`
    scheduler: str  # class name
    timesteps: tuple[float, ...]  # the scheduler's, one a step, in its own unit (1,000 is noise)
    guidance_scale: float

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> "CalibratedRun":
        """The run under way, or the last one. Guidance counts as 1, none, on a pipeline that was never called."""
        scheduler = pipe.scheduler
        timesteps = tuple(round(float(timestep), 2) for timestep in scheduler.timesteps)
        guidance = float(getattr(pipe, "guidance_scale", 1.0))
        return cls(fingerprint(pipe.transformer), type(scheduler).__name__, timesteps, guidance)

    @property
    def num_inference_steps(self) -> int:
        return len(self.timesteps)

    def check_model(self, pipe: DiffusionPipeline) -> None:
        """Raise ValueError unless this is the model that was calibrated."""
        found = fingerprint(pipe.transformer)
        if found != self.model:
            raise ValueError(f"this was calibrated on model {self.model}, this one is {found}: calibrate anew")

    def check_run(self, pipe: DiffusionPipeline) -> None:
        """Raise ValueError unless scheduler, steps, time grid and guidance of the run under way are the calibrated."""
        timesteps = [float(timestep) for timestep in pipe.scheduler.timesteps]
        guidance = float(getattr(pipe, "guidance_scale", 1.0))
        found = (type(pipe.scheduler).__name__, len(timesteps), guidance)
        wanted = (self.scheduler, self.num_inference_steps, self.guidance_scale)
        if found != wanted:
            raise ValueError(
                "this was calibrated for {} with {} steps and guidance {:g}, ".format(*wanted)
                + "this run is {} with {} steps and guidance {:g}: calibrate anew".format(*found)
            )
        for step, (ours, theirs) in enumerate(zip(timesteps, self.timesteps, strict=True)):
            if abs(ours - theirs) > TIMESTEP_TOLERANCE:
                raise ValueError(
                    f"this was calibrated on another time grid: timestep {step} was {theirs:g}, in this run it is "
                    f"{ours:g} (another shift, or another image size where the shift depends on it): calibrate anew"
                )

    def describe(self) -> str:
        """Steps, scheduler and guidance, in words."""
        return f"{self.num_inference_steps} steps of {self.scheduler}, guidance {self.guidance_scale:g}"
