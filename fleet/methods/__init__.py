"""The realign methods. To add one: a file with a `RealignMethod` subclass, and its name in `Edit` (`controls.py`)."""

from typing import Annotated

from pydantic import Field

from fleet.methods.base import Decision, ModuleStatistics, Ranks, RealignMethod
from fleet.methods.controls import Control, Edit, Noise, RandomModules, RandomSubspace, UniformScaling
from fleet.methods.csulora import CsuLora
from fleet.methods.lox import Lox
from fleet.methods.mask_spec import MaskTraining
from fleet.methods.resta import Resta
from fleet.methods.revert import Revert
from fleet.methods.safe_lora import SafeLora
from fleet.methods.safemerge import SafeMerge
from fleet.methods.somf import Somf
from fleet.methods.splora import SpLora
from fleet.methods.wise_ft import WiseFt

AnyControl = Annotated[UniformScaling | RandomModules | RandomSubspace | Noise, Field(discriminator="method")]

AnyRealignMethod = Annotated[Edit | AnyControl, Field(discriminator="method")]
"""Every method a manifest may name, told apart by `method`."""

__all__ = [
    "AnyControl", "AnyRealignMethod", "Control", "CsuLora", "Decision", "Lox", "MaskTraining", "ModuleStatistics",
    "Noise", "RandomModules", "RandomSubspace", "Ranks", "RealignMethod", "Resta", "Revert", "SafeLora", "SafeMerge",
    "Somf", "SpLora", "UniformScaling", "WiseFt",
]  # fmt: skip
