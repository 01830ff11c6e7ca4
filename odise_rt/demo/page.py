"""The page's layout in Gradio, and which control leads to which call of the :class:`Workbench`.

Gradio draws the controls and carries the events. The picture with its segments is one HTML component of our own
(``assets/stage.html``, ``stage.js``), which sends pictures to :mod:`odise_rt.demo.server` rather than through Gradio's
uploads: those are written to a disk.
"""

# No `from __future__ import annotations` here: Gradio finds out by the annotations of a handler what it must pass, and
# could not resolve their text, as it is imported inside functions.

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odise_rt.demo.downloads import FORMATS
from odise_rt.demo.session import MAX_TEXT, Controls, Words, Workbench
from odise_rt.errors import InputError, OdiseError
from odise_rt.vocabulary import BUILTIN

if TYPE_CHECKING:
    import gradio

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
STARTING_WORDS = "person\ndog, hound\ncar, automobile\nchair\nsky, clouds\ngrass, lawn\nroad, street"
MODES = [("Panoptic", "panoptic"), ("Semantic", "semantic"), ("Instance", "instance")]
SYNTAX = """\
A **new line** or `;` ends a class, a `,` separates its synonyms; the first one is the name that you will see.

| you write | you get |
| --- | --- |
| `pickup truck, truck` | one class with two names, of which the better one counts |
| `stuff: stained glass` | *stuff*: all of it is one segment |
| `thing: christmas tree` | *things*: one segment for each of them |
| `# trees for later` | a comment |

Without `thing:` or `stuff:`, words such as *sky*, *grass*, *road* or *wall* are stuff, all others are things. Any words
go; those of the training count as *seen* and trust the diffusion classifier more, others trust CLIP more.
"""
_CHANGED = "() => { window.dispatchEvent(new Event('odise-changed')); }"
_FAILED = "() => { window.dispatchEvent(new CustomEvent('odise-failed', { detail: '%s' })); }"
# A browser may forbid a page to keep anything: it works all the same.
_REMEMBER = "(...values) => { try { localStorage.setItem(%s, JSON.stringify(values)); } catch {} }"
_RECALL = """(...values) => {
    let kept = null;
    try { kept = JSON.parse(localStorage.getItem(%s)); } catch {}
    return kept?.length === values.length ? kept : values;
}"""
_TOGGLE_THEME = "() => { document.body.classList.toggle('dark'); }"


def page_settings() -> dict[str, Any]:
    """Theme and style sheet, as ``mount_gradio_app`` takes them. Only fonts of the visitor's system: nothing is fetched
    from elsewhere."""
    import gradio as gr

    theme = gr.themes.Default(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=["system-ui", "Segoe UI", "Helvetica Neue", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    ).set(  # the theme's own greys and teal are too pale to read: WCAG asks for a contrast of 4.5
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        color_accent="*primary_600",
    )
    return {"theme": theme, "css": (ASSETS / "page.css").read_text(encoding="utf-8")}


def build_page(bench: Workbench) -> "gradio.Blocks":
    """The page for one workbench."""
    import gradio as gr

    facts, bundle = bench.segmenter.facts, bench.segmenter.bundle
    about = f"{bundle.name}, {facts.variant} variant, on {bench.segmenter.device.upper()}. "
    about += f"{len(bundle.training_vocabulary):,} words were seen in training; you may use any."
    with gr.Blocks(title="odise_rt", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_classes="top"):
            gr.Markdown("# Segment anything you can name", elem_classes="headline")
            gr.Markdown(about, elem_classes="subtitle")
            theme = gr.Button("Light / dark", size="sm", elem_classes="theme", scale=0, min_width=110)
        with gr.Row(elem_classes="columns", equal_height=False):
            with gr.Column(scale=0, min_width=340, elem_classes="controls"):
                words, lists = _words("Words", STARTING_WORDS, "words-a")
                with gr.Accordion("How to write words", open=False, elem_classes="syntax"):
                    gr.Markdown(SYNTAX)
                compare = gr.Checkbox(False, label="Compare with a second vocabulary", elem_id="compare")
                with gr.Group(visible=False) as second:
                    other_words, other_lists = _words("Second vocabulary", "", "words-b")
                apply = gr.Button("Name the segments", variant="primary", elem_id="apply")
                mode = gr.Radio(MODES, value="panoptic", label="Show", elem_id="mode")
                sliders = _sliders(bench)
                reset = gr.Button("Back to the model's own values", size="sm", elem_id="reset")
            with gr.Column(scale=1, min_width=320, elem_classes="stage-column"):
                stage = gr.HTML(
                    html_template=(ASSETS / "stage.html").read_text(encoding="utf-8"),
                    js_on_load=(ASSETS / "stage.js").read_text(encoding="utf-8"),
                    apply_default_css=False,
                    elem_id="stage",
                    examples=[{"title": e.title, "thumbnail": e.thumbnail} for e in bench.examples],
                    formats=[{"kind": kind, "title": each.title} for kind, each in FORMATS.items()],
                )
        settings = [words, lists, compare, other_words, other_lists, mode, *sliders]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

        theme.click(None, js=_TOGGLE_THEME, api_visibility="private")
        # The stage asks for one picture at a time, and for names again when the last answer is there: with Gradio's own
        # modes for events in the meantime, they would be lost or come with the data of the first one.
        find = stage.find(_on_find(bench), None, stage, trigger_mode="multiple", concurrency_limit=1, **quiet)
        name = stage.name(
            _on_name(bench), settings, [stage, words], trigger_mode="multiple", concurrency_limit=4, **quiet
        )
        find.failure(None, js=_FAILED % "find", api_visibility="private")
        name.failure(None, js=_FAILED % "name", api_visibility="private")
        gr.on(
            [apply.click, words.submit, words.blur, other_words.submit, other_words.blur]
            + [control.change for control in (lists, compare, other_lists, mode, *sliders)],
            None,
            js=_CHANGED,
            api_visibility="private",
        )
        # In the visitor's own browser, for the next time, and for Gradio reloads the page when it lost the server.
        place = json.dumps(f"odise_rt {bundle.name}")
        page.load(None, settings, settings, js=_RECALL % place, api_visibility="private")
        changes = [control.change for control in settings]
        gr.on(changes, None, settings, js=_REMEMBER % place, api_visibility="private")
        compare.change(lambda on: gr.Group(visible=on), compare, second, **quiet)
        mode.change(lambda kind: gr.Slider(visible=kind == "instance"), mode, sliders[-1], **quiet)
        values = [slider.value for slider in sliders]
        reset.click(lambda: values, None, sliders, **quiet)
        page.unload(_on_unload(bench))
    page.queue(max_size=64)
    blocks: gradio.Blocks = page
    return blocks


def _words(label: str, value: str, identifier: str) -> tuple[Any, Any]:
    import gradio as gr

    text = gr.Textbox(
        value,
        label=label,
        lines=6,
        max_lines=6,
        max_length=MAX_TEXT,
        placeholder="one class a line; commas separate synonyms",
        info="Shift + Enter applies them",
        elem_id=identifier,
    )
    lists = gr.CheckboxGroup(
        [("all" if name == "auto" else name.upper(), name) for name in BUILTIN],
        label="and built-in lists",
        elem_id=f"{identifier}-lists",
    )
    return text, lists


def _sliders(bench: Workbench) -> list[Any]:
    """One slider for each threshold, in the order of the fields of :class:`Controls`."""
    import gradio as gr

    facts = bench.segmenter.facts

    def slider(identifier: str, label: str, info: str, value: float, visible: bool = True) -> Any:
        return gr.Slider(0, 1, value, step=0.01, label=label, info=info, elem_id=identifier, visible=visible)

    with gr.Group(elem_classes="thresholds"):
        return [
            slider("object-mask", "Mask score", "panoptic: least score of a mask", facts.object_mask_threshold),
            slider("overlap", "Overlap", "panoptic: share of its mask it keeps", facts.overlap_threshold),
            slider("clip-seen", "CLIP, seen words", "CLIP's weight, diffusion has the rest", facts.clip_weight_seen),
            slider("clip-unseen", "CLIP, unseen words", "the same for other words", facts.clip_weight_unseen),
            slider("unknown", "Unknown below", "least probability of a name; 0: off", 0.0),
            slider("least-score", "Object score", "instance: least score", 0.3, visible=False),
        ]


def _controls(
    words: str,
    lists: list[str],
    compare: bool,
    other_words: str,
    other_lists: list[str],
    mode: Any,
    *thresholds: float,
) -> Controls:
    """The values of the page's controls, in their order on the page."""
    object_mask, overlap, clip_seen, clip_unseen, unknown, least_score = map(float, thresholds)
    second = Words(other_words or "", tuple(other_lists or ()))
    return Controls(
        words=Words(words or "", tuple(lists or ())),
        other=second if compare and (second.text.strip() or second.lists) else None,  # not before there are words
        mode=mode,
        object_mask_threshold=object_mask,
        overlap_threshold=overlap,
        clip_weight_seen=clip_seen,
        clip_weight_unseen=clip_unseen,
        unknown=unknown,
        least_score=least_score,
    )


def _on_find(bench: Workbench) -> Any:
    import gradio as gr

    def on_find(event: gr.EventData, request: gr.Request) -> Any:
        """A picture was sent or an example is wanted: run the network. The settings play no part in it."""
        try:
            asked = event._data or {}
            if "example" in asked:
                picture = bench.add_example(int(asked["example"]))
            else:
                picture = bench.store.get(str(asked.get("token")))
            bench.store.get(picture.token, owner=request.session_hash)
            return gr.HTML(found=_answer({"token": picture.token, "ran": bench.masks(picture)[1]}))
        except Exception as exc:
            return gr.HTML(found=_answer({"error": _message(exc)}))

    return on_find


def _on_name(bench: Workbench) -> Any:
    import gradio as gr

    # Words that come from the page itself give way to those of an example; a visitor's own do not.
    replaceable = {"", STARTING_WORDS, *(example.words for example in bench.examples)}

    def on_name(event: gr.EventData, request: gr.Request, *settings: Any) -> tuple[Any, Any]:
        """A picture is to be shown, or something was set: name its masks; the network does not run again."""
        words = gr.skip()
        try:
            asked = event._data or {}
            picture = bench.store.get(str(asked.get("token")), owner=request.session_hash)
        except InputError as exc:
            return _answer({"error": _message(exc), "gone": True}), words
        try:
            if "example" in asked and str(settings[0]).strip() in replaceable:
                words = bench.examples[int(asked["example"])].words or words
                settings = (words, *settings[1:])
            corrections = tuple((float(x), float(y), str(label)) for x, y, label in asked.get("corrections", ()))
            controls = dataclasses.replace(_controls(*settings), corrections=corrections)
            return _answer(bench.show(picture, controls)), words
        except Exception as exc:
            return _answer({"error": _message(exc)}), words

    return on_name


def _answer(content: dict[str, Any]) -> dict[str, Any]:
    """Gradio tells the page of a value only if it differs from the one before, and the page waits for every answer."""
    return content | {"serial": str(time.time_ns())}


def _on_unload(bench: Workbench) -> Any:
    import gradio as gr

    def on_unload(request: gr.Request) -> None:
        """A visitor left: forget the pictures."""
        if request.session_hash:
            bench.store.forget(request.session_hash)

    return on_unload


def _message(error: Exception) -> str:
    """What the page says of an error. Only our own errors speak to visitors; others go to the log."""
    if isinstance(error, OdiseError):
        text = str(error)
        return text[:1].upper() + text[1:]
    logger.error("an event of the page failed", exc_info=error)
    return "The server met an unexpected error; its log says more. Try another picture or other words."
