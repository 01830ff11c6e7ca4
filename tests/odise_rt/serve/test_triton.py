"""A real tritonserver serves what ``odise-rt export-triton`` wrote, and answers as the local segmenter does.

nvidia-pytriton carries one, with the Python backend alone; it runs under Debian's Python 3.11. Make an environment
for it once, anywhere, and name it::

    /usr/bin/python3.11 -m venv DIR
    DIR/bin/pip install nvidia-pytriton==0.7.0 onnxruntime pillow tokenizers tqdm
    ODISE_RT_TRITON_ENV=DIR python -m pytest tests/odise_rt/serve/test_triton.py

So graphs run in Python-backend models reached by BLS, and inside the orchestrator; Triton's own ONNX Runtime and
TensorRT backends are not part of that package, and the layout for them is tested as written, not as run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.running_server import ROOT
from odise_rt import Bundle, Segmenter, SegmentOptions
from odise_rt.serve.triton.repository import RepositoryOptions, export_repository
from tests.odise_rt.fake_bundle import colour_image

VARIABLE = "ODISE_RT_TRITON_ENV"
WORDS = "red, crimson; green; blue; white"
OPTIONS = {"short_edge": 48, "overlap_threshold": 0.5}

# Runs in Triton's environment, which has tritonclient; asks for each job and stores what comes.
CLIENT = """
import json, sys
import numpy as np
import tritonclient.grpc as grpc

def tensor(name, array, kind):
    given = grpc.InferInput(name, array.shape, kind)
    given.set_data_from_numpy(array)
    return given

def text(value):
    return np.array([value.encode()], dtype=np.object_)

jobs = json.load(open(sys.argv[2]))
client = grpc.InferenceServerClient(sys.argv[1])
results = []
for job in jobs:
    inputs = []
    if "image" in job:
        inputs.append(tensor("IMAGE", np.frombuffer(open(job["image"], "rb").read(), np.uint8), "UINT8"))
    if "pixels" in job:
        inputs.append(tensor("PIXELS", np.load(job["pixels"]), "UINT8"))
    if "words" in job:
        inputs.append(tensor("VOCABULARY", text(job["words"]), "BYTES"))
    if "options" in job:
        inputs.append(tensor("OPTIONS", text(json.dumps(job["options"])), "BYTES"))
    try:
        answer = client.infer("odise", inputs)
    except grpc.InferenceServerException as exc:
        results.append({"error": exc.message(), "status": exc.status()})
        continue
    np.save(job["out"], answer.as_numpy("SEGMENT_MAP"))
    results.append({"result": json.loads(answer.as_numpy("RESULT")[0])})
json.dump(results, open(sys.argv[3], "w"))
"""


def environment() -> Path:
    named = os.environ.get(VARIABLE)
    if not named:
        pytest.skip(f"needs an environment with nvidia-pytriton, named by ${VARIABLE}: see this file's first lines")
    found = next(iter(Path(named).glob("lib/python3.*/site-packages/pytriton/tritonserver")), None)
    if found is None:
        pytest.skip(f"{named} holds no nvidia-pytriton")
    return Path(named)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def tritonserver(env: Path, repository: Path, folder: Path) -> Iterator[int]:
    """Start the server on loopback ports; gives the one for gRPC."""
    server = next(env.glob("lib/python3.*/site-packages/pytriton/tritonserver"))
    # The package keeps the backend's process of each Python version beside, and joins them when it starts the server.
    backends = folder / "backends"
    shutil.copytree(server / "backends", backends)
    version = server.parents[2].name.removeprefix("python")
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    # Stands for an installed package: the backend's interpreter ignores PYTHONPATH, but looks beside its own files.
    (backends / "python" / "odise_rt").symlink_to(ROOT / "odise_rt")
    http, grpc, metrics = free_ports(3)
    command = [
        str(server / "bin/tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        f"--metrics-port={metrics}",
        *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
        "--exit-on-error=true",
        f"--backend-config=python,shm-region-prefix-name=odise{os.getpid()}",
    ]
    libraries = [
        str(p)
        for p in (server.parents[1] / "nvidia_pytriton.libs", server / "external_libs", server / "lib")
        if p.is_dir()
    ]
    variables = os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PATH": f"{env / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    log = folder / "triton.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=folder)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{http}/v2/health/ready", timeout=2) as response,
            ):
                if response.status == 200:
                    break
            time.sleep(0.3)
        yield grpc
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(env: Path, port: int, folder: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    script, given, answers = folder / "client.py", folder / "jobs.json", folder / "answers.json"
    script.write_text(CLIENT)
    given.write_text(json.dumps(jobs))
    command = [str(env / "bin/python"), str(script), f"127.0.0.1:{port}", str(given), str(answers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(answers.read_text())
    return results


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize("stages", ["python", "inside"])
@pytest.mark.parametrize("variant", ["label", "caption"])
def test_triton_answers_as_the_local_segmenter(
    stages: Any, variant: str, label_bundle: Path, caption_bundle: Path, tmp_path: Path
) -> None:
    env = environment()
    bundle = label_bundle if variant == "label" else caption_bundle
    export_repository(Bundle.open(bundle), tmp_path / "models", RepositoryOptions(stages=stages, max_pixels=50_000))
    pixels = colour_image(64, 224)  # four windows
    np.save(tmp_path / "pixels.npy", pixels)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    np.save(tmp_path / "large.npy", np.zeros((300, 300, 3), np.uint8))
    photo, array = str(tmp_path / "photo.png"), str(tmp_path / "pixels.npy")
    jobs = [
        {"image": photo, "words": WORDS, "out": str(tmp_path / "0.npy")},
        {"pixels": array, "words": WORDS, "options": OPTIONS, "out": str(tmp_path / "1.npy")},
        {"image": str(tmp_path / "broken.png"), "words": WORDS},
        {"pixels": str(tmp_path / "large.npy"), "words": WORDS},
        {"image": photo, "words": " ; "},
        {"image": photo, "pixels": array, "words": WORDS},
        {"image": photo, "words": WORDS, "options": {"short_edge": 200}},
        {"image": photo, "words": WORDS, "out": str(tmp_path / "7.npy")},
    ]
    with tritonserver(env, tmp_path / "models", tmp_path) as port:
        answers = ask(env, port, tmp_path, jobs)

    with Segmenter.load(bundle, device="cpu", threads=1, disk_cache=False) as segmenter:
        expected = {0: segmenter.segment(pixels, WORDS), 1: segmenter.segment(pixels, WORDS, SegmentOptions(**OPTIONS))}
    expected[7] = expected[0]  # after all those mistakes
    for number, result in expected.items():
        assert "result" in answers[number], answers[number]
        np.testing.assert_array_equal(np.load(tmp_path / f"{number}.npy"), result.segment_map)
        found = answers[number]["result"]
        assert [s["label"] for s in found["segments"]] == [s.label for s in result.segments]
        np.testing.assert_allclose([s["score"] for s in found["segments"]], [s.score for s in result.segments], 1e-4)
        assert found["facts"]["bundle_digest"] == Bundle.open(bundle).digest
        engines = {s["engine"] for s in found["facts"]["stages"]}
        assert engines == {"triton"} if stages == "python" else all("onnxruntime" in e for e in engines)
    for number, words in {
        2: "ImageError",
        3: "ImageTooLargeError",
        4: "VocabularyError",
        5: "one of IMAGE",
        6: "at most 64",
    }.items():
        assert words in answers[number]["error"]
        assert "Traceback" not in answers[number]["error"]
        assert "INVALID_ARGUMENT" in answers[number]["status"]
