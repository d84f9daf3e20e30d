"""The realign methods. To add one: a file with a `RealignMethod` subclass, and its name in the union below."""

from typing import Annotated

from pydantic import Field

from fleet.methods.base import Decision, ModuleStatistics, RealignMethod
from fleet.methods.safemerge import SafeMerge
from fleet.methods.wise_ft import WiseFt

AnyRealignMethod = Annotated[SafeMerge | WiseFt, Field(discriminator="method")]
"""Every method a manifest may name, told apart by `method`."""

__all__ = ["AnyRealignMethod", "Decision", "ModuleStatistics", "RealignMethod", "SafeMerge", "WiseFt"]
