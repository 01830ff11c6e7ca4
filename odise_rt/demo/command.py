"""``odise-rt demo``: its arguments, and from them to a running page."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from odise_rt.errors import MissingPackageError, OptionsError
from odise_rt.listening import add_listening_arguments, answered_hosts, listen
from odise_rt.model_arguments import add_bundle_argument, add_engine_arguments, named_bundle


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("demo", parents=[common], help="Open a web page to try a bundle with your pictures.")
    add_bundle_argument(parser)
    add_listening_arguments(parser, port=7860)
    parser.add_argument(
        "--examples",
        type=Path,
        metavar="DIR",
        help="Folder with example pictures; the words for boat.jpg are in boat.txt. Default: those of the package.",
    )
    add_engine_arguments(parser)
    parser.add_argument("--no-verify", action="store_true", help="Skip the SHA-256 of the bundle's files.")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="Refuse larger pictures. Default: 32 megapixels.")
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB", help="Memory for visitors' pictures.")
    parser.add_argument(
        "--word-cache",
        action="store_true",
        help="Keep the embeddings of visitors' words on the disk, and not in memory alone.",
    )
    parser.set_defaults(command=run_demo)


def run_demo(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C.

    Raises:
        OptionsError: no bundle was named, or an option cannot be used.
        MissingPackageError: Gradio is not installed.
    """
    from odise_rt.demo.examples import find_examples
    from odise_rt.demo.pictures import PictureStore
    from odise_rt.demo.server import serve
    from odise_rt.demo.session import DEFAULT_MAX_PIXELS, Workbench
    from odise_rt.segmenter import Segmenter

    bundle = named_bundle(args)
    for option, value in (("--max-pixels", args.max_pixels), ("--memory", args.memory)):
        if value is not None and value < 1:
            raise OptionsError(f"{option} is {value}: expected at least 1")
    if importlib.util.find_spec("gradio") is None:
        raise MissingPackageError("the page needs Gradio: install it with: pip install 'odise_rt[demo]'")
    examples = find_examples(args.examples)
    with (
        listen(args.host, args.port) as listener,
        Segmenter.load(
            bundle,
            device=args.device,
            cpu_engine=args.cpu_engine,
            threads=args.threads,
            verify=not args.no_verify,
            disk_cache=args.word_cache,
        ) as segmenter,
    ):
        store = PictureStore(max_bytes=args.memory << 20)
        bench = Workbench(segmenter, store, examples, args.max_pixels or DEFAULT_MAX_PIXELS)

        def ready(address: str) -> None:
            if args.json:
                text = json.dumps({"url": address, "bundle": segmenter.bundle.name, "device": segmenter.device})
            else:
                text = f"odise-rt demo: {segmenter.bundle.name} at {address} (Ctrl-C stops it)"
            print(text, flush=True)

        serve(bench, listener, answered_hosts(listener, args.host, args.allow_host), ready)
    return 0
