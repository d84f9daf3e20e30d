"""From an address to the model behind it: a folder of a store or the Hub, or a view of one (of vocabulary or head).

`open_model`, `open_full` and `open_curvature` keep the headers they have read, for the many units of work that name the
same models. They are for what doesn't change while a process runs: artifacts, pinned sources, sources of a planned run.
"""

from __future__ import annotations

from fleet.checkpoint.advice import advice
from fleet.checkpoint.curvature import Curvature, read_curvature
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import HEADERS_CACHE_BYTES, TENSOR_BYTES
from fleet.checkpoint.heads import open_base_folder
from fleet.checkpoint.model import Model, read_model, require_full_model
from fleet.checkpoint.vocabulary import VOCABULARY_SCHEME, open_in_vocabulary
from fleet.core.errors import CheckpointError
from fleet.core.sized_cache import SizedCache
from fleet.store import Folder, open_folder


def open_model_folder(uri: str) -> Folder:
    """A model's own files, or a view of them: see `joined_address`, `with_head_of` and `Vocabulary.address`.

    Raises:
        SourceError: as `open_folder`.
        CheckpointError: it is a file of llama.cpp's, or the models that a vocabulary is made of can't be read, or don't
            go together.
    """
    if uri.lower().endswith(".gguf"):
        raise CheckpointError(f"{uri}: {advice('model', [uri.rpartition('/')[2]])}")
    return open_in_vocabulary(uri) if uri.startswith(VOCABULARY_SCHEME) else open_base_folder(uri)


def open_model(uri: str) -> Model:
    """A model's headers; read once while there is room for them.

    Raises:
        SourceError: nothing can be read there.
        CheckpointError: as `read_model`.
    """
    return _models(uri)


def open_full(uri: str) -> FullModel:
    """The same, of a model that has to be a full one.

    Raises:
        SourceError: nothing can be read there.
        CheckpointError: as `read_model`, or it is an adapter.
    """
    return require_full_model(open_model(uri), uri)


def open_curvature(uri: str) -> Curvature:
    """The headers of a model's Fisher or Gram matrices; read once while there is room for them.

    Raises:
        SourceError: nothing can be read there.
        CheckpointError: as `read_curvature`.
    """
    return _curvatures(uri)


_models: SizedCache[str, Model] = SizedCache(
    lambda uri: read_model(open_model_folder(uri)), lambda model: model.memory_bytes, HEADERS_CACHE_BYTES
)
_curvatures: SizedCache[str, Curvature] = SizedCache(
    lambda uri: read_curvature(open_folder(uri)), lambda found: len(found.tensors) * TENSOR_BYTES, HEADERS_CACHE_BYTES
)
