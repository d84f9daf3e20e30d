"""The fusion methods. To add one: a file with a `FusionMethod` subclass, and its name in the union below."""

from typing import Annotated

from pydantic import Field

from fleet.fusion.arcee_fusion import ArceeFusion
from fleet.fusion.base import FusionMethod
from fleet.fusion.breadcrumbs import Breadcrumbs
from fleet.fusion.consensus import Consensus
from fleet.fusion.dare import Dare
from fleet.fusion.della import Della
from fleet.fusion.fisher import Fisher
from fleet.fusion.iso import Iso
from fleet.fusion.karcher import Karcher
from fleet.fusion.knots import Knots
from fleet.fusion.model_stock import ModelStock
from fleet.fusion.multi_slerp import MultiSlerp
from fleet.fusion.nearswap import NearSwap
from fleet.fusion.nuslerp import NuSlerp
from fleet.fusion.ram import Ram, RamPlusTl
from fleet.fusion.regmean import RegMean
from fleet.fusion.sce import Sce
from fleet.fusion.slerp import Slerp
from fleet.fusion.task_arithmetic import TaskArithmetic
from fleet.fusion.ties import Ties
from fleet.fusion.tsv import Tsv
from fleet.fusion.weight_average import WeightAverage

AnyFusionMethod = Annotated[
    WeightAverage
    | TaskArithmetic
    | Ties
    | Dare
    | Della
    | Breadcrumbs
    | Consensus
    | Sce
    | Slerp
    | MultiSlerp
    | NuSlerp
    | Karcher
    | ModelStock
    | Knots
    | Tsv
    | Iso
    | Fisher
    | RegMean
    | ArceeFusion
    | NearSwap
    | Ram
    | RamPlusTl,
    Field(discriminator="method"),
]
"""Every method a manifest may name, told apart by `method`."""

__all__ = [
    "AnyFusionMethod",
    "ArceeFusion",
    "Breadcrumbs",
    "Consensus",
    "Dare",
    "Della",
    "Fisher",
    "FusionMethod",
    "Iso",
    "Karcher",
    "Knots",
    "ModelStock",
    "MultiSlerp",
    "NearSwap",
    "NuSlerp",
    "Ram",
    "RamPlusTl",
    "RegMean",
    "Sce",
    "Slerp",
    "TaskArithmetic",
    "Ties",
    "Tsv",
    "WeightAverage",
]
