"""The network on this GPU: each stage on each engine against PyTorch, and the whole of it in three implementations.

Only what is installed is measured; what is not is a row that says what is missing. PyTorch models need diffusers,
open_clip_torch and transformers, which the runtime does not.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_rows import Emit, Row
from benchmarks.harness import Summary, time_calls
from benchmarks.stage_costs import PIXELS_TO_SEGMENTS, WHOLE_NETWORK
from benchmarks.timed_picture import WORDS, picture
from odise_rt.errors import OdiseError
from odise_rt.specs import IMAGE_STAGES
from odise_rt.text_embeddings import EmbeddedVocabulary, normalise

MODEL_PACKAGES = ("torch", "diffusers", "open_clip", "transformers", "safetensors")
SIZES: tuple[tuple[int, int], ...] = ((1024, 1024), (512, 512), (1024, 1408))
"""Height and width, the most important first: time may be up before the last."""
NEEDED_TFLOP = {(512, 512): 3.4, (1024, 1024): 12.4, (1024, 1408): 18.0}
"""What the pruned network must compute (odise.md section 10)."""
INSIDE_THE_NETWORK = (PIXELS_TO_SEGMENTS, WHOLE_NETWORK, "stitch", *IMAGE_STAGES)
"""Names of a result's seconds: in one piece where the image stays on the GPU, else stage by stage."""
# Relative to the largest value of an output, as the export has them for half precision.
MAX_ERROR, MEAN_ERROR = 5e-2, 5e-3
MAX_OTHER_PIXELS = 0.02
"""Share of pixels that may go to another segment: those on which two masks are as good as equal."""
PIPELINE_SIZES = ((256, 384), (300, 200))
"""Pixels of images that stay on the GPU: more windows than one, a canvas with padding."""


def missing_packages(names: Sequence[str]) -> list[str]:
    """Those that cannot be imported here."""
    return [name for name in names if importlib.util.find_spec(name) is None]


# ---- stages on engines -----------------------------------------------------------------------------------------------


def check_engines(emit: Emit, bundle_dir: Path, checkpoint: Path, quick: bool) -> None:
    """Every stage of a bundle on every engine that there is, against PyTorch, else against ONNX Runtime on the CPU."""
    from odise_rt.bundle import Bundle

    if not (bundle_dir / "bundle.json").is_file():
        detail = (
            f"no bundle in {bundle_dir}: python -m export.build_engines --checkpoint {checkpoint} --out {bundle_dir}"
        )
        emit(Row("engines", "bundle", "missing", detail=detail))
        return
    bundle = Bundle.open(bundle_dir)
    engines = list(_engines(emit, bundle))
    if not engines:
        return
    reference, name = _reference_backend(checkpoint)
    if reference is None:
        emit(Row("engines", "reference", "missing", detail=name))
        return
    side = 256 if quick else 512
    inputs = stage_inputs(bundle, reference, side)
    expected = {stage: reference.load(bundle, stage).run(arrays) for stage, arrays in inputs.items()}
    for engine, load in engines:
        for stage, arrays in inputs.items():
            _check_stage(emit, engine, stage, load, arrays, expected[stage], name)
    check_pipeline(emit, bundle_dir)


def _reference_backend(checkpoint: Path) -> tuple[Any, str]:
    lacking = missing_packages(MODEL_PACKAGES)
    if not lacking and checkpoint.is_dir():
        from training.checkpoints import load_checkpoint
        from training.torch_stages import TorchBackend

        return TorchBackend(load_checkpoint(checkpoint).model), "PyTorch float32"
    from odise_rt.backends.ort import OrtBackend

    try:
        return OrtBackend("cpu"), f"ONNX Runtime on the CPU (PyTorch's model needs {', '.join(lacking) or checkpoint})"
    except OdiseError as exc:
        return None, f"neither PyTorch's model ({', '.join(lacking)} missing) nor ONNX Runtime: {exc}"


def stage_inputs(bundle: Any, reference: Any, side: int) -> dict[str, dict[str, np.ndarray]]:
    """Inputs of each stage as a real image gives them: every stage gets what the reference made before."""
    from odise_rt.specs import LEVELS
    from odise_rt.windows import Stitcher, cut_windows, window_grid

    facts, constants = bundle.facts, bundle.constants()
    side = max(side, facts.window)
    image = np.ascontiguousarray(picture(side, side).transpose(2, 0, 1)[None].astype(np.float32) / 255)
    grid = window_grid(side, side, facts.window)
    inputs: dict[str, dict[str, np.ndarray]] = {"clip_image": {"windows": cut_windows(image, grid)}}
    embedding = reference.load(bundle, "clip_image").run(inputs["clip_image"])["image_embedding"]
    inputs["unet_tap"] = {
        **inputs["clip_image"],
        "image_embedding": embedding,
        "noise": constants["noise"],
        "null_text_embedding": constants["null_text_embedding"],
    }
    stitcher = Stitcher(grid, dict(zip(LEVELS, facts.level_strides, strict=True)))
    stitcher.add(reference.load(bundle, "unet_tap").run(inputs["unet_tap"]))
    inputs["mask_decoder"] = stitcher.finish()
    decoded = reference.load(bundle, "mask_decoder").run(inputs["mask_decoder"])
    inputs["clip_mask"] = {"image": image, "mask_logits": decoded["mask_logits"]}
    tokens = np.full((5, facts.context_length), facts.pad_token, np.int64)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = facts.start_token, np.arange(5) + 3, facts.end_token
    inputs["clip_text"] = {"tokens": tokens}
    return inputs


def _engines(emit: Emit, bundle: Any) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """Engines that work here, by name, with what loads a stage; a row for each that does not."""
    from odise_rt.backends.engine_stage import open_engine_stage
    from odise_rt.backends.machine import this_machine
    from odise_rt.backends.ort import OrtBackend
    from odise_rt.engine_facts import ENGINE_KINDS
    from odise_rt.engines import find_engines

    try:
        backend = OrtBackend("cuda")
        yield "ort-cuda, portable graph", lambda stage: backend.load(bundle, stage)
    except OdiseError as exc:
        emit(Row("engines", "ort-cuda, portable graph", "missing", detail=str(exc)))
    machine, found = this_machine(), find_engines(bundle)
    for kind in ENGINE_KINDS:
        fitting = {stage: found.fitting(bundle, machine, stage, kind) for stage in bundle.stages}
        for stage, engine in fitting.items():
            if engine is None:
                why = found.why_not(bundle, machine, stage, kind)
                emit(Row("engines", f"{kind} {stage}", "missing", detail=str(why)))
        usable = {stage: engine for stage, engine in fitting.items() if engine is not None}
        if usable:

            def load(stage: str, usable: Any = usable) -> Any:
                return open_engine_stage(usable[stage], bundle.stages[stage].spec) if stage in usable else None

            yield kind, load


def _check_stage(
    emit: Emit, engine: str, stage: str, load: Callable[[str], Any], inputs: Any, expected: Any, reference: str
) -> None:
    name = f"{engine} {stage}"
    try:
        loaded = load(stage)
        if loaded is None:
            return
        with contextlib.closing(loaded):
            outputs = loaded.run(inputs)
            samples = time_calls(lambda: loaded.run(inputs), repeats=5, warmup=0)
    except Exception as exc:  # an engine may fail in any way; the others must still be checked
        emit(Row("engines", name, "fail", "correctness", detail=f"{type(exc).__name__}: {exc}"[:300]))
        return
    largest, mean, broken = compare_outputs(outputs, expected)
    good = not broken and largest <= MAX_ERROR and mean <= MEAN_ERROR
    values = {"max_error": largest, "mean_error": mean, "host_to_host_ms": Summary.of(samples).median * 1e3}
    detail = f"against {reference}" + (f"; not finite or of another shape: {', '.join(broken)}" if broken else "")
    emit(Row("engines", name, "pass" if good else "fail", "correctness", values, detail))


def compare_outputs(outputs: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, float, list[str]]:
    """Largest and mean error relative to the largest value, over all outputs, and names of those that are broken."""
    largest = mean = 0.0
    broken = []
    for name, wanted in expected.items():
        found = outputs.get(name)
        if found is None or found.shape != wanted.shape or not np.isfinite(found).all():
            broken.append(name)
            continue
        scale = max(float(np.abs(wanted).max()), 1e-30)
        difference = np.abs(found.astype(np.float64) - wanted)
        largest, mean = max(largest, float(difference.max()) / scale), max(mean, float(difference.mean()) / scale)
    return largest, mean, broken


# ---- the whole network -----------------------------------------------------------------------------------------------


def time_pytorch(emit: Emit, structure: str, config: str, quick: bool) -> None:
    """Pixels on the GPU to masks and embeddings, random weights in half precision.

    Args:
        emit: receives the rows.
        structure: "official" in eager mode, or "pruned" through torch.compile.
        config: a preset.
        quick: fewer repeats, and only the first size.
    """
    part = f"{structure} network"
    lacking = missing_packages(MODEL_PACKAGES)
    if lacking:
        detail = f"PyTorch's model needs {', '.join(lacking)}: pip install 'odise_rt[train]'"
        emit(Row(part, f"{structure} model", "missing", "time", detail=detail))
        return
    import torch

    from benchmarks.gpu_kernels import Gpu

    gpu = Gpu(quick)
    gpu.repeats = 3 if quick else 10
    ceilings = gpu.ceilings()
    model = random_model(config, "cuda")
    model.structure = structure
    if structure == "pruned":
        model.drop_sd_text()  # only the official structure runs it
    run = network_call(model, "cuda", torch.float16, compiled=structure == "pruned")
    for height, width in SIZES[: 1 if quick else None]:
        name = f"{structure} {'compiled' if structure == 'pruned' else 'eager'} fp16 {height}x{width}"
        image = torch.rand(1, 3, height, width, device="cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            summary = gpu.seconds(lambda image=image: run(image), warmup=2)  # type: ignore[misc]
        except Exception as exc:  # out of memory, or a compiler that gives up: the next size may still work
            emit(Row(part, name, "error", "time", detail=f"{type(exc).__name__}: {exc}".splitlines()[0][:300]))
            gc.collect()
            torch.cuda.empty_cache()
            continue
        emit(Row(part, name, "measured", "time", network_values(
            summary, (height, width), ceilings.matmul_flops, int(torch.cuda.max_memory_reserved()) - gpu.other.nbytes,
            "peak_reserved_gib",
        )))  # fmt: skip


def random_model(config: str, device: str) -> Any:
    """A preset with random weights, made on the device."""
    import torch

    from training.checkpoints.own_format import uninitialised_model
    from training.config import preset
    from training.initialization import initialise

    with torch.device(device):
        model = uninitialised_model(preset(config))
    model = model.to(device)
    initialise(model, seed=0)
    return model.eval()


def network_call(model: Any, device: str, dtype: Any, compiled: bool) -> Callable[[Any], Any]:
    """A call on one image (1, 3, h, w) in [0, 1]: weights in ``dtype``, under autocast as the official demo runs."""
    import torch

    model = model.to(dtype)
    forward = torch.compile(model.segment_features, dynamic=False) if compiled else model.segment_features

    def run(image: Any) -> Any:
        with torch.inference_mode(), torch.autocast(device, dtype=dtype):
            return forward(image.to(dtype))

    return run


def network_values(
    seconds: Summary, size: tuple[int, int], matmul_flops: float, memory_bytes: int, memory: str
) -> dict[str, float | int | str]:
    """What a row says of one size; ``memory`` names what kind of memory ``memory_bytes`` are."""
    values: dict[str, float | int | str] = {
        "median_ms": seconds.median * 1e3,
        "p10_ms": seconds.p10 * 1e3,
        "p90_ms": seconds.p90 * 1e3,
    }
    if size in NEEDED_TFLOP and matmul_flops > 0:
        values["of_matmul_rate"] = NEEDED_TFLOP[size] * 1e12 / seconds.median / matmul_flops
    values[memory] = memory_bytes / 2**30
    return values


def time_runtime(emit: Emit, bundle_dir: Path | None, config: str, quick: bool) -> None:
    """odise_rt from pixels to segments on the GPU, with a full-size bundle."""
    part = "runtime"
    if bundle_dir is None or not (bundle_dir / "bundle.json").is_file():
        detail = (
            f"no full-size bundle{'' if bundle_dir is None else f' in {bundle_dir}'}: python -m export.build_engines "
            f"--config {config} --init random --out DIR, then --full-bundle DIR (elsewhere: benchmarks.weightless)"
        )
        emit(Row(part, "full-size bundle", "missing", "time", detail=detail))
        return
    from odise_rt.options import SegmentOptions
    from odise_rt.segmenter import Segmenter

    rate = 0.0
    if not missing_packages(["torch"]):
        from benchmarks.gpu_kernels import Gpu

        rate = Gpu(quick).ceilings().matmul_flops
        import torch

        torch.cuda.empty_cache()
    before = used_memory()
    try:
        segmenter = Segmenter.load(bundle_dir, device="cuda", verify=False)
    except OdiseError as exc:
        emit(Row(part, "load", "missing", "time", detail=str(exc)))
        return
    with segmenter:
        segmenter.prepare(WORDS)
        for height, width in SIZES[: 1 if quick else None]:
            name = f"runtime {height}x{width}"
            options = SegmentOptions(short_edge=min(height, width), long_edge=max(height, width))
            image = picture(height, width)
            try:
                segmenter.segment(image, WORDS, options)
                samples, network = [], []
                for _ in range(3 if quick else 8):
                    start = time.perf_counter()
                    facts = segmenter.segment(image, WORDS, options).facts
                    samples.append(time.perf_counter() - start)
                    network.append(sum(facts.seconds.get(key, 0.0) for key in INSIDE_THE_NETWORK))
            except OdiseError as exc:
                emit(Row(part, name, "error", "time", detail=str(exc)[:300]))
                continue
            values = network_values(
                Summary.of(network), (height, width), rate, max(0, used_memory() - before), "device_gib"
            )
            values["pixels_to_segments_ms"] = Summary.of(samples).median * 1e3
            detail = f"{facts.engine}; the network by the host's clock; memory: the device's, while it is loaded"
            emit(Row(part, name, "measured", "time", values, detail))


def check_pipeline(emit: Emit, bundle_dir: Path) -> None:
    """Hold images that stay on the GPU to images that pass through host memory, on the same engines."""
    from odise_rt.segmenter import Segmenter

    images = {f"{height}x{width}": picture(height, width) for height, width in PIPELINE_SIZES}
    try:
        with Segmenter.load(bundle_dir, device="cuda", verify=False, stay_on_gpu=False) as segmenter:
            expected = {name: _answers(segmenter, image) for name, image in images.items()}
        with Segmenter.load(bundle_dir, device="cuda", verify=False) as segmenter:
            _compare_answers(emit, segmenter, images, expected)
    except OdiseError as exc:
        emit(Row("engines", "image on the GPU", "missing", "correctness", detail=str(exc)[:300]))


def _answers(segmenter: Any, image: Any, words: EmbeddedVocabulary | None = None) -> dict[str, Any]:
    """What the network says, and the segments that it becomes with ``words``.

    Without words, those are taken that the masks themselves are like: with random weights no real word would leave the
    merge anything to do.
    """
    from odise_rt.classification import Classifier
    from odise_rt.naming import NamingRequest
    from odise_rt.options import SegmentOptions
    from odise_rt.postprocessing import MaskResizer

    found = segmenter.find_masks(image)
    queries, height, width = found.masks.shape
    if words is None:
        words = EmbeddedVocabulary(normalise(found.embeddings.mask), normalise(found.embeddings.clip))
    options = SegmentOptions(object_mask_threshold=0.0, overlap_threshold=0.0, explain=0).resolve(segmenter.facts)
    classifier = Classifier(
        segmenter.facts,
        segmenter.bundle.constants().get("no_object_embedding"),
        words,
        np.arange(queries),
        np.full(queries, options.clip_weight_seen, np.float32),
    )
    words_id = hashlib.sha256(words.mask_text.tobytes()).hexdigest()
    request = NamingRequest(classifier, words_id, np.arange(queries) % 2 == 0, options)
    resizer = MaskResizer((height, width), found.network_size, found.original_size)
    return {
        "mask_logits": found.mask_logits,
        "mask": found.embeddings.mask,
        "clip": found.embeddings.clip,
        "words": words,
        "segment_map": found.masks.name(found.embeddings, request, resizer, lambda step: None).segment_map,
    }


def _compare_answers(emit: Emit, segmenter: Any, images: dict[str, Any], expected: dict[str, Any]) -> None:
    if WHOLE_NETWORK not in segmenter.find_masks(next(iter(images.values()))).seconds:
        detail = "needs cuda-core and the CUDA kernels (make kernels)"
        emit(Row("engines", "image on the GPU", "missing", "correctness", detail=detail))
        return
    for name, image in images.items():
        for what, given in (("host", image), ("host, again", image), ("GPU", _on_gpu(image))):
            row = f"image on the GPU, {name} from {what}"
            if given is None:
                emit(Row("engines", row, "missing", "correctness", detail="needs a CUDA build of PyTorch"))
                continue
            try:
                found = _answers(segmenter, given, expected[name]["words"])
            except OdiseError as exc:
                emit(Row("engines", row, "fail", "correctness", detail=f"{type(exc).__name__}: {exc}"[:300]))
                continue
            compared = ("mask_logits", "mask", "clip")
            largest, mean, broken = compare_outputs(
                {key: found[key] for key in compared}, {key: expected[name][key] for key in compared}
            )
            other = float((found["segment_map"] != expected[name]["segment_map"]).mean())
            good = not broken and largest <= MAX_ERROR and mean <= MEAN_ERROR and other <= MAX_OTHER_PIXELS
            values: dict[str, float | int | str] = {
                "max_error": largest, "mean_error": mean, "other_pixels": other,
            }  # fmt: skip
            detail = "against the same engines through host memory"
            emit(Row("engines", row, "pass" if good else "fail", "correctness", values, detail))


def _on_gpu(image: np.ndarray) -> Any:
    """The same pixels in the GPU's memory, or ``None`` where PyTorch cannot put them there."""
    if missing_packages(["torch"]):
        return None
    import torch

    return torch.from_numpy(image).cuda() if torch.cuda.is_available() else None


def used_memory() -> int:
    """Bytes in use on the first GPU by everybody, or 0 where that cannot be asked."""
    try:
        from cuda.bindings import driver

        error, free, total = driver.cuMemGetInfo()
    except Exception:  # no package, no driver, no context: nothing to report
        return 0
    return int(total) - int(free) if int(error) == 0 else 0
