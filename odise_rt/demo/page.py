"""The page's layout in Gradio.

Gradio draws the controls, and tells what is set on them to the picture with its segments, which is one HTML component
of our own (``assets``). That asks the routes of :mod:`odise_rt.demo.routes`; nothing goes to the server through Gradio,
whose uploads are written to a disk and whose page loads itself anew after a lost connection.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odise_rt.demo.asked import Settings
from odise_rt.demo.downloads import FORMATS
from odise_rt.demo.session import MAX_TEXT, Workbench
from odise_rt.vocabulary import BUILTIN

if TYPE_CHECKING:
    import gradio

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("page.js", "server.js", "pictures.js", "view.js", "downloads.js", "stage.js")
"""Parts of one function, in their order."""
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
# Scripts that Gradio runs. A browser may forbid a page to keep anything: it works all the same.
_SET = """(...values) => {
    window.odiseSettings = values;
    window.dispatchEvent(new CustomEvent("odise-set", { detail: %s }));
    try { localStorage.setItem(%s, JSON.stringify(values)); } catch {}
}"""
_LOAD = """(...values) => {
    let kept = null;
    try {
        kept = JSON.parse(localStorage.getItem(%s));
        const theme = localStorage.getItem("odise_rt theme");
        if (theme) document.body.classList.toggle("dark", theme === "dark");
    } catch {}
    return window.odiseSettings = kept?.length === values.length ? kept : values;
}"""
_TOGGLE_THEME = """() => {
    const dark = document.body.classList.toggle("dark");
    try { localStorage.setItem("odise_rt theme", dark ? "dark" : "light"); } catch {}
}"""


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


def build_page(bench: Workbench) -> gradio.Blocks:
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
                with gr.Group(elem_classes="second"):
                    other_words, other_lists = _words("Second vocabulary", "", "words-b")
                apply = gr.Button("Name the segments", variant="primary", elem_id="apply")
                mode = gr.Radio(MODES, value="panoptic", label="Show", elem_id="mode")
                sliders = _sliders(bench)
                reset = gr.Button("Back to the model's own values", size="sm", elem_id="reset")
            with gr.Column(scale=1, min_width=320, elem_classes="stage-column"):
                stage = gr.HTML(
                    html_template=(ASSETS / "stage.html").read_text(encoding="utf-8"),
                    js_on_load="".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS),
                    apply_default_css=False,
                    elem_id="stage",
                    examples=[{"title": e.title, "thumbnail": e.thumbnail, "words": e.words} for e in bench.examples],
                    starting_words=STARTING_WORDS,
                    formats=[{"kind": kind, "title": each.title} for kind, each in FORMATS.items() if each.in_menu],
                    settings=[field.name for field in dataclasses.fields(Settings)],
                )
        settings = [words, lists, compare, other_words, other_lists, mode, *sliders]
        assert len(settings) == len(dataclasses.fields(Settings))
        private: dict[str, Any] = {"api_visibility": "private"}  # and none has a function of the server's

        place = json.dumps(f"odise_rt {bundle.name}")

        def tell(events: list[Any], what: str) -> None:
            gr.on(events, None, settings, js=_SET % (json.dumps(what), place), **private)

        theme.click(None, js=_TOGGLE_THEME, **private)
        page.load(None, settings, settings, js=_LOAD % place, **private)
        chosen = [control.change for control in (lists, compare, other_lists, mode, *sliders)]
        tell([words.change, other_words.change], "typed")
        tell([words.submit, words.blur, other_words.submit, other_words.blur, *chosen], "changed")
        tell([apply.click], "applied")
        values = json.dumps([slider.value for slider in sliders])
        reset.click(None, None, sliders, js=f"() => {values}", **private)
        stage.bring(None, None, words, js="() => window.odiseSettings[0]", **private)
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
        elem_classes="words",
    )
    lists = gr.CheckboxGroup(
        [("all" if name == "auto" else name.upper(), name) for name in BUILTIN],
        label="and built-in lists",
        elem_id=f"{identifier}-lists",
    )
    return text, lists


def _sliders(bench: Workbench) -> list[Any]:
    """One slider for each threshold, in the order of the fields of :class:`Settings`."""
    import gradio as gr

    facts = bench.segmenter.facts

    def slider(identifier: str, label: str, info: str, value: float) -> Any:
        return gr.Slider(0, 1, value, step=0.01, label=label, info=info, elem_id=identifier)

    with gr.Group(elem_classes="thresholds"):
        return [
            slider("object-mask", "Mask score", "panoptic: least score of a mask", facts.object_mask_threshold),
            slider("overlap", "Overlap", "panoptic: share of its mask it keeps", facts.overlap_threshold),
            slider("clip-seen", "CLIP, seen words", "CLIP's weight, diffusion has the rest", facts.clip_weight_seen),
            slider("clip-unseen", "CLIP, unseen words", "the same for other words", facts.clip_weight_unseen),
            slider("unknown", "Unknown below", "least probability of a name; 0: off", 0.0),
            slider("least-score", "Object score", "instance: least score", 0.3),
        ]
