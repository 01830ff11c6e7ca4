"""``odise-rt serve``: its options, and from them the server's settings."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from odise_rt.cores import usable_cores
from odise_rt.errors import OptionsError
from odise_rt.kernels.native import why_no_kernels
from odise_rt.listening import add_listening_arguments
from odise_rt.model_arguments import add_bundle_argument, add_engine_arguments, named_bundle
from odise_rt.serve.limits import MAX_CONNECTIONS, Limits
from odise_rt.serve.log import log_with_time

TOKEN_VARIABLE = "ODISE_RT_TOKEN"


def add_parser(commands: Any, common: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the command to the parser of the command line."""
    defaults = Limits()
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve", parents=[common], help="Serve segmentation over HTTP, by default to this machine only."
    )
    add_bundle_argument(parser, positional=True)
    add_listening_arguments(parser, port=8000)
    parser.add_argument(
        "--vocabulary",
        action="append",
        default=[],
        metavar="[NAME=]SOURCE",
        help="A vocabulary that requests may name: coco, ade20k, lvis, NAME=FILE or NAME=WORDS. May be repeated.",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        help="File with a token that requests must carry (Authorization: Bearer …). Default: the token in "
        f"${TOKEN_VARIABLE}, if any.",
    )
    model = parser.add_argument_group("model")
    add_engine_arguments(model, threads="cores over replicas")
    model.add_argument(
        "--concurrency", type=int, help="Requests in work per replica. Default: 1; on a GPU or with batching 4."
    )
    model.add_argument(
        "--batch-windows",
        choices=["auto", "on", "off"],
        default="auto",
        help="Run windows of concurrent requests together. auto: on a GPU without the CUDA kernels.",
    )
    model.add_argument("--batch-wait-ms", type=float, default=0.0, help="Milliseconds to wait for a batch to fill.")
    model.add_argument("--max-batch-windows", type=int, help="Windows in one run. Default: the engine's choice.")
    model.add_argument("--word-cache", action="store_true", help="Keep embeddings of words on disk, requests' too.")
    model.add_argument("--no-verify", action="store_true", help="Skip the SHA-256 of the bundle's files.")
    replicas = parser.add_argument_group("replicas (Ray Serve)")
    replicas.add_argument("--in-process", action="store_true", help="One model in this process, without Ray.")
    replicas.add_argument("--replicas", type=int, default=1, help="Copies of the model.")
    replicas.add_argument(
        "--max-replicas", type=int, help="Let Ray Serve add copies up to this number under load. Default: none."
    )
    replicas.add_argument(
        "--cpus-per-replica", type=float, default=1.0, help="CPUs, or a part of one, that Ray sets aside for each."
    )
    replicas.add_argument(
        "--gpus-per-replica", type=float, default=0.0, help="GPUs, or a part of one, that Ray sets aside for each."
    )
    replicas.add_argument(
        "--ray-address", help="Use this Ray cluster (auto: the one of this machine). Default: a new one here."
    )
    replicas.add_argument(
        "--object-store-mb", type=int, help="MiB of Ray's shared memory. Default: enough for a full queue."
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-request-mb", type=float, default=defaults.max_request_bytes / 2**20, help="MiB of a request."
    )
    limits.add_argument("--max-pixels", type=int, default=defaults.max_pixels, help="Pixels of an image as given.")
    limits.add_argument(
        "--max-words", type=int, default=defaults.max_words, help="Words of a request, synonyms counted."
    )
    limits.add_argument(
        "--max-short-edge", type=int, help="Pixels: bound on the option short_edge. Default: the model's."
    )
    limits.add_argument(
        "--max-long-edge", type=int, help="Pixels: bound on the option long_edge. Default: the model's."
    )
    limits.add_argument("--queue", type=int, default=defaults.queue, help="Requests that may wait.")
    limits.add_argument(
        "--timeout", type=float, default=defaults.timeout, help="Seconds from the end of the upload to the answer."
    )
    limits.add_argument("--upload-timeout", type=float, default=defaults.upload_timeout, help="Seconds for the upload.")
    limits.add_argument(
        "--keep-alive",
        type=float,
        default=75.0,
        help="Seconds for which an idle connection is kept; more than a load balancer keeps its own.",
    )
    limits.add_argument(
        "--shutdown-delay",
        type=float,
        default=0.0,
        help="Seconds for which a server that is stopped still takes requests, while /readyz says 503, so that a load "
        "balancer turns away first.",
    )
    limits.add_argument(
        "--drain-seconds",
        type=float,
        help="Seconds for accepted requests when the server is stopped. Default: --timeout.",
    )
    return parser


def run(args: argparse.Namespace, write: Callable[[str], object]) -> int:
    """Run the command with parsed arguments; returns when the server was stopped."""
    from odise_rt.serve.server import serve

    settings = settings_from(args)
    log_with_time(args.json)

    def say(event: str, url: str) -> None:
        if args.json:
            write(json.dumps({"event": event} | ({"url": url} if url else {})))
        elif event == "listening":
            write(f"listening on {url}, loading the model")
        elif event == "ready":
            write(f"ready: {url}/docs")
        else:
            write("stopping: requests that were accepted are finished (again to stop at once)")

    serve(settings, say)
    return 0


def settings_from(args: argparse.Namespace) -> Any:
    """The server's settings.

    Raises:
        OptionsError: no bundle was named, or an option is out of range or contradicts another one.
        VocabularyError: a vocabulary cannot be read.
    """
    from odise_rt.backends.window_batching import WindowBatching
    from odise_rt.serve.application import ReplicaSettings
    from odise_rt.serve.server import ServerSettings
    from odise_rt.serve.worker import WorkerSettings

    bundle = named_bundle(args, "BUNDLE")
    if args.in_process and (args.replicas != 1 or args.max_replicas or args.ray_address):
        raise OptionsError("--in-process serves one model without Ray: leave out --replicas and --ray-address")
    for name in (
        "max_request_mb",
        "keep_alive",
        "shutdown_delay",
        "drain_seconds",
        "cpus_per_replica",
        "gpus_per_replica",
    ):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise OptionsError(f"--{name.replace('_', '-')} is {value}: expected a finite number of at least 0")
    if args.object_store_mb is not None and args.object_store_mb < 0:
        raise OptionsError(f"--object-store-mb is {args.object_store_mb}: expected at least 0")
    limits = Limits(
        max_request_bytes=int(args.max_request_mb * 2**20),
        max_pixels=args.max_pixels,
        max_words=args.max_words,
        max_short_edge=args.max_short_edge,
        max_long_edge=args.max_long_edge,
        queue=args.queue,
        timeout=args.timeout,
        upload_timeout=args.upload_timeout,
    )
    replicas = ReplicaSettings(
        replicas=args.replicas,
        max_replicas=args.max_replicas,
        cpus=args.cpus_per_replica,
        gpus=args.gpus_per_replica,
        ray_address=args.ray_address,
        object_store_bytes=args.object_store_mb << 20 if args.object_store_mb else None,
    )
    if args.batch_windows == "off" and (args.max_batch_windows is not None or args.batch_wait_ms):
        raise OptionsError("--batch-windows is off: leave out --max-batch-windows and --batch-wait-ms")
    wanted = WindowBatching(args.max_batch_windows, args.batch_wait_ms / 1000)  # checked whether it is used or not
    on_gpu = args.batch_windows == "auto" and _runs_on_gpu(args.device, bundle)
    batching = wanted if args.batch_windows == "on" or (on_gpu and why_no_kernels() is not None) else None
    # With one image on the GPU the next ones are decoded.
    concurrency = args.concurrency if args.concurrency is not None else 4 if batching or on_gpu else 1
    if not 1 <= concurrency <= MAX_CONNECTIONS:
        raise OptionsError(f"--concurrency is {concurrency}: expected 1 to {MAX_CONNECTIONS}")
    copies = args.max_replicas or args.replicas
    threads = args.threads if args.threads is not None else max(1, usable_cores() // copies)
    worker = WorkerSettings(
        bundle=bundle,
        device=args.device,
        cpu_engine=args.cpu_engine,
        threads=threads,
        verify=not args.no_verify,
        concurrency=concurrency,
        batching=batching,
        word_cache=args.word_cache,
        vocabularies=_named_vocabularies(args.vocabulary),
        limits=limits,
    )
    return ServerSettings(
        worker=worker,
        replicas=replicas,
        in_process=args.in_process,
        host=args.host,
        port=args.port,
        token=_token(args.token_file),
        allowed_hosts=tuple(args.allow_host),
        keep_alive=args.keep_alive,
        shutdown_delay=args.shutdown_delay,
        drain=args.drain_seconds,
    )


def _runs_on_gpu(device: str, bundle: Path) -> bool:
    """Whether the model will. For ``"auto"`` a GPU is tried, which takes a while."""
    if device != "auto":
        return device == "cuda"
    from odise_rt.backends.select import gpu_if_it_works
    from odise_rt.bundle import Bundle

    return gpu_if_it_works(None, Bundle.open(bundle, verify=False)) is not None


def _named_vocabularies(texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, vocabulary in map(named_vocabulary, texts):
        if name in found:
            raise OptionsError(
                f"two vocabularies have the name {name!r}: expected NAME=SOURCE with another name for one"
            )
        found[name] = vocabulary
    return found


def named_vocabulary(text: str) -> tuple[str, Any]:
    """``NAME=SOURCE``, or a built-in list or file under its own name.

    Raises:
        OptionsError: there is no name.
        VocabularyError: the vocabulary cannot be read.
    """
    from odise_rt.vocabulary import BUILTIN, Vocabulary

    name, equals, source = text.partition("=")
    if not equals:
        source = text
        name = text.strip().lower() if text.strip().lower() in BUILTIN else Path(text).stem
        if name not in BUILTIN and not text.endswith((".json", ".txt")):
            raise OptionsError(
                f"--vocabulary {text[:40]!r} has no name: expected NAME=WORDS, a file or a built-in list"
            )
    if not name or not all(c.isalnum() or c in "-_." for c in name):
        raise OptionsError(
            f"the vocabulary's name {name[:40]!r} is no name: expected letters, digits, '-', '_' and '.'"
        )
    return name, Vocabulary.load(source)


def _token(path: Path | None) -> str | None:
    source = f"${TOKEN_VARIABLE}" if path is None else str(path)
    if path is None:
        given = os.environ.get(TOKEN_VARIABLE)
        if not given:
            return None
    else:
        try:
            given = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise OptionsError(f"cannot read the token from {path} ({exc}): check the path") from exc
    token = given.strip()
    if not token or not token.isprintable() or not token.isascii():
        raise OptionsError(f"{source} holds no token: expected one line of printable ASCII")
    return token
