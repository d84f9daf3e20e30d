"""The steps of a plan, one file a kind: what each is made of, what it asks of workers, what its record says.

To add a kind: a file with a `Step` subclass, its line below, and a call in `fleet.steps.builder` where the manifest
asks for it. They are in the order in which people see them.
"""

from fleet.steps.base import KINDS, Step, register
from fleet.steps.calibrate import CalibrateStep
from fleet.steps.fuse import FuseStep
from fleet.steps.mask import LogProbsStep, MaskStep
from fleet.steps.realign import RealignStep
from fleet.steps.score import ScoreStep
from fleet.steps.survey import DisplacementStep, SurveyStep
from fleet.steps.trim import TrimStep

register(DisplacementStep)
register(SurveyStep)
register(LogProbsStep)
register(MaskStep)
register(RealignStep)
register(TrimStep)
register(FuseStep)
register(CalibrateStep)
register(ScoreStep)

__all__ = ["KINDS", "Step", "register"]
