"""The model that clients of Triton call: pre- and postprocessing here, graphs by other models or here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from odise_rt.backends.pool import StagePool
from odise_rt.bundle import Bundle
from odise_rt.errors import BackendError, InputError, OdiseError, OptionsError
from odise_rt.files import decode_json, json_bytes
from odise_rt.options import SegmentOptions
from odise_rt.private_words import keep_words_out_of_the_log
from odise_rt.segmenter import Segmenter
from odise_rt.serve.fields import OPTIONS, segment_options
from odise_rt.serve.limits import DEFAULT_MAX_WORDS, Limits
from odise_rt.serve.triton.bls import TritonBackend, backend_utils
from odise_rt.serve.triton.repository import parameters_of
from odise_rt.serve.worker import read_words
from odise_rt.specs import STAGES
from odise_rt.text_embeddings import TextEmbedder


class TritonPythonModel:
    """Triton's interface to a model in Python."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load what is beside this model; called once for each instance."""
        keep_words_out_of_the_log()
        parameters = parameters_of(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"] / "bundle"
        device = parameters["device"]
        self._limits = Limits(
            max_pixels=int(parameters["max_pixels"]),
            max_words=int(parameters.get("max_words", DEFAULT_MAX_WORDS)),  # not in repositories of older versions
        )
        if parameters["stages"] == "inside":
            self._segmenter = Segmenter.load(
                folder, device=device, disk_cache=False, keep_text_encoder=True  # type: ignore[arg-type]
            )  # fmt: skip
            return
        bundle = Bundle.open(folder, graphs=False)
        backend = TritonBackend(args["model_name"], "cuda" if device == "cuda" else "cpu")
        stages = StagePool(backend, bundle, keep=frozenset(STAGES))
        self._segmenter = Segmenter(bundle, backend, stages, TextEmbedder(bundle, stages, None))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Serve requests; a mistake of one client is an error of its response alone."""
        utils = backend_utils()
        responses = []
        for request in requests:
            try:
                responses.append(self._serve(utils, request))
            except OdiseError as exc:
                code = utils.TritonError.INVALID_ARG if isinstance(exc, InputError) else utils.TritonError.INTERNAL
                error = utils.TritonError(f"{type(exc).__name__}: {exc}", code)
                responses.append(utils.InferenceResponse(error=error))
            except Exception as exc:  # the boundary: the log has the details, the client learns the type
                utils.Logger.log_error(f"unexpected error: {type(exc).__name__}: {exc}")
                error = utils.TritonError(f"an unexpected {type(exc).__name__}; the server's log has the details")
                responses.append(utils.InferenceResponse(error=error))
        return responses

    def _serve(self, utils: Any, request: Any) -> Any:
        def given(name: str) -> np.ndarray | None:
            tensor = utils.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy()

        image, pixels = given("IMAGE"), given("PIXELS")
        if (image is None) == (pixels is None):
            raise OptionsError("expected one of IMAGE (an encoded image, uint8) and PIXELS (uint8, height x width x 3)")
        words = given("VOCABULARY")
        if words is None or words.size != 1:
            raise OptionsError("expected VOCABULARY: one string, 'truck, pickup; stuff: sky' or JSON")
        options = read_options(given("OPTIONS"), self._limits.max_pixels)
        self._limits.check_costs(options, self._segmenter.facts)
        source = image.tobytes() if image is not None else pixels
        assert source is not None, "one of them was given"
        vocabulary = read_words(_text(words), self._limits.max_words)
        result = self._segmenter.segment(source, vocabulary, options)
        masks = options.outputs != ("panoptic",)  # SEGMENT_MAP has those of segments alone
        document = json_bytes(result.to_dict(rle_masks=masks, explain=options.explain > 0))
        outputs = [
            utils.Tensor("SEGMENT_MAP", np.ascontiguousarray(result.segment_map, np.int32)),
            utils.Tensor("RESULT", np.array([document], dtype=np.object_)),
        ]
        return utils.InferenceResponse(output_tensors=outputs)

    def finalize(self) -> None:
        """Release the model."""
        self._segmenter.close()


def read_options(value: np.ndarray | None, max_pixels: int) -> SegmentOptions:
    """Options of a request.

    Args:
        value: one string, a JSON object with keys of :data:`~odise_rt.serve.fields.OPTIONS`; ``None``: the model's own.
        max_pixels: of the server; clients cannot change it.

    Raises:
        OptionsError: it is no such object, or a value is out of range.
    """
    data = {} if value is None else decode_json(_text(value), "OPTIONS", OptionsError)
    unknown = sorted(set(data) - set(OPTIONS)) if isinstance(data, dict) else ["no object"]
    if unknown:
        raise OptionsError(
            f"OPTIONS has {', '.join(unknown)[:100]}: expected an object with some of {', '.join(OPTIONS)}"
        )
    if isinstance(data.get("outputs"), list):
        data["outputs"] = tuple(data["outputs"])
    try:
        return segment_options(data, max_pixels)
    except TypeError as exc:
        raise OptionsError(f"OPTIONS has a value of the wrong type ({exc})") from exc


def _text(value: np.ndarray) -> str:
    if value.size != 1:
        raise OptionsError(f"a text input has {value.size} strings: expected one")
    raw = value.reshape(-1)[0]
    if not isinstance(raw, bytes):
        raise BackendError(f"Triton handed over a {type(raw).__name__} where bytes were expected")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise OptionsError(f"a text input is not UTF-8 ({exc.reason}): encode it") from exc
