"""The web demo: chat with a model and search its index, in a browser.

Each visitor has their own conversation, stored as turns, from which the page is drawn. The model serves one visitor at a
time. Visitors cannot read files of this machine: uploads are decoded here, shown images are written into a temporary folder,
and only this folder is served. It is deleted when the demo ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html import escape
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from fromage.distribution import pip_install
from fromage.errors import UserError
from fromage.models.fromage import Fromage

try:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
except ImportError as error:
    raise UserError(f"the web demo needs Gradio: {pip_install('demo')}") from error

from fromage.apps.web.guard import Guard, GuardedBlocks
from fromage.apps.web.pointing import Pointing
from fromage.apps.web.sessions import MAX_SENT, SLIDERS, Sessions, conversation
from fromage.apps.web.shelf import shelf_at
from fromage.generation.options import HELP, LIMITS
from fromage.generation.preset import Preset
from fromage.retrieval.where import MOST
from fromage.serving.connections import address, guarded, open_port

if TYPE_CHECKING:
    from fromage.octopus.model import Octopus
    from fromage.retrieval.base import ImageIndex

CACHE, EXAMPLES = "GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"
UPLOAD = "20mb"  # maximum size of one file
SESSIONS = 200  # conversations kept; beyond it the least recently used one is deleted
QUEUE = 64  # requests that may wait
KEPT = 24 * 3600  # seconds that images stay in the temporary folder, if there is room for them (shelf)
SECONDS = 60.0  # in which a page must take what is sent to it
MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # the events that use the model
PLAIN: dict[str, Any] = {"render_markdown": False, "latex_delimiters": [], "show_label": False}  # plain text
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
.gradio-container {max-width: 1200px !important; margin: 0 auto !important}
.message-buttons {display: none !important}  /* sharing with strangers */
.message img {width: min(144px, 24vw); object-fit: contain !important}
.bot.message, .user.message {display: flex !important; flex-wrap: wrap}  /* images in a row, texts below */
.message.panel-full-width {flex: 1 1 100%; width: auto !important}
.message.component {flex: 0 0 auto !important}
.message-content .md {white-space: pre-line}
.grid-wrap {max-height: none !important}
.grid-container {grid-template-columns: repeat(auto-fill, minmax(min(220px, 40%), 1fr)) !important}
.caption-label {white-space: normal !important; display: -webkit-box !important; -webkit-box-orient: vertical;
  -webkit-line-clamp: 6; padding-bottom: 0 !important; border-bottom: 4px solid transparent !important;
  left: 0 !important; right: 0 !important; max-width: 100% !important; line-height: 1.3 !important}
.grid-wrap .thumbnail-lg {aspect-ratio: auto !important; display: flex !important; flex-direction: column}
.grid-wrap .thumbnail-lg img {aspect-ratio: 1; height: auto !important}
.grid-wrap .caption-label {position: static !important; flex: 1; width: 100%; text-align: left}
.about {margin: 0}
"""
ABOUT = """# FROMAGe
A frozen language model that sees images and answers with images. Send words, images, or both."""
FINDS = " Where it writes `[RET]`, the answer shows which of the {count:,} images of its index is meant."
NO_INDEX = " It was started without an index of images, so it answers in text alone."


def launch(
    model: Fromage,
    index: ImageIndex | None,
    preset: Preset,
    host: str,
    port: int,
    octopus: Octopus | None = None,
) -> None:
    """Serve the demo until Ctrl-C. Raises UserError where the port is taken."""
    with running(model, index, preset, host, port, octopus) as address:
        print(f"the demo is at {address} (Ctrl-C ends it)", flush=True)
        try:
            Event().wait()
        except KeyboardInterrupt:
            print()


@contextmanager
def running(
    model: Fromage,
    index: ImageIndex | None,
    preset: Preset,
    host: str,
    port: int,
    octopus: Octopus | None = None,
) -> Iterator[str]:
    """The demo, served in the background; yields its address."""
    with open_port(host, port) as listening, _cache() as folder:
        sessions = Sessions(model, index, preset)
        blocks = page(sessions, Pointing(octopus, sessions.lock) if octopus else None)
        shelf = shelf_at(str(folder))
        shelf.forget = blocks.upload_file_set.discard
        guard = Guard(_app(blocks, host, port), shelf)
        server = uvicorn.Server(guarded(guard, host, SECONDS, log_level="warning", timeout_graceful_shutdown=1))
        thread = Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield address(host, listening)
        finally:
            blocks.close(verbose=False)
            server.should_exit = True
            thread.join(5)


@contextmanager
def _cache() -> Iterator[Path]:
    """A temporary folder for uploads and shown images; Gradio's default is one permanent folder for all its demos.

    In it too lies what Gradio would serve beside them, from a folder of the place where the demo is started.
    """
    before = {name: os.environ.get(name) for name in (CACHE, EXAMPLES)}
    with tempfile.TemporaryDirectory(prefix="fromage-") as folder:
        os.environ |= {CACHE: folder, EXAMPLES: str(Path(folder, "examples"))}
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _app(blocks: gr.Blocks, host: str, port: int) -> FastAPI:
    """The page as an application."""
    blocks.has_launched = True  # else Gradio does not look where files lie
    blocks.state_session_capacity = SESSIONS
    return gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        "/",
        server_name=host,
        server_port=port,
        show_error=False,
        max_file_size=UPLOAD,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        theme=THEME,
        css=CSS,
        app_kwargs={"openapi_url": None},
    )


def page(sessions: Sessions, pointing: Pointing | None = None) -> gr.Blocks:
    """The page: tabs for conversation and search, and with an Octopus a third one for pointing at objects."""
    about = ABOUT + (FINDS.format(count=len(sessions.index)) if sessions.index else NO_INDEX)
    with GuardedBlocks(title="FROMAGe", analytics_enabled=False, delete_cache=(600, KEPT)) as blocks:
        gr.Markdown(about)
        gr.HTML(f'<p class="about">{escape(sessions.model_line())}</p>')
        with gr.Tab("Chat"):
            box, examples = _chat(sessions)
        with gr.Tab("Search"):
            _search(sessions)
        if pointing:
            with gr.Tab("Point"):
                _point(pointing)
        for button, text in examples:
            button.click(partial(dict, text=text, files=[]), None, box, queue=False, api_visibility="private")
    return blocks.queue(max_size=QUEUE, api_open=False)


def _chat(sessions: Sessions) -> tuple[gr.MultimodalTextbox, list[tuple[gr.Button, str]]]:
    """The tab; returns its input box, and buttons with the texts that they put there."""
    turns = gr.State([])
    with gr.Row():
        with gr.Column(scale=3):
            shown = gr.Chatbot(height="58vh", buttons=[], allow_file_downloads=False, **PLAIN)
            box = _box(sessions, MAX_SENT)
            with gr.Row():
                examples = [(gr.Button(text, size="sm", min_width=200), text) for text in sessions.preset.examples]
            with gr.Row():
                stop, undo, new = (gr.Button(name, size="md", min_width=80) for name in ("Stop", "Undo", "New"))
        with gr.Column(scale=1):
            settings = _settings(sessions)
    asked = box.submit(sessions.answer, [box, turns, *settings], [box, shown, turns], **MODEL)
    stop.click(conversation, turns, shown, cancels=asked, queue=False)
    undo.click(sessions.undo, turns, [shown, turns], **MODEL)
    gr.on([new.click, shown.clear], lambda: ([], []), None, [shown, turns], cancels=asked, queue=False)
    return box, examples


def _box(sessions: Sessions, files: int) -> gr.MultimodalTextbox:
    caption = sessions.index.first().caption if sessions.index else ""
    such_as = f", such as: {caption[:80]}" if caption else ""
    return _message_box(f"words, an image, or both{such_as}", files)


def _message_box(placeholder: str, files: int) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        show_label=False,
        placeholder=placeholder,
        file_types=["image"],
        file_count="multiple" if files > 1 else "single",
    )


def _settings(sessions: Sessions) -> list[gr.Slider]:
    """In the order of Sessions.answer."""
    gr.Markdown("### How answers are made")
    return [_slider(name, getattr(sessions.preset.decoding, name)) for name in SLIDERS]


def _slider(name: str, value: float) -> gr.Slider:
    limits = LIMITS[name]
    assert limits.slider is not None
    least, most, step = limits.slider
    return gr.Slider(min(least, value), max(most, value), value, step=step, label=limits.label, info=HELP[name])


def _search(sessions: Sessions) -> None:
    if sessions.index is None:
        gr.Markdown("There is no index to search: the demo was started without `--index`.")
        return
    with gr.Row():
        with gr.Column(scale=3):
            box = _box(sessions, 1)
        with gr.Column(scale=1):
            count = gr.Slider(1, 24, 8, step=1, label="Images")
            asked = [box, count]
            if columns := sessions.index.about().get("columns"):
                over = f"such as year >= 2019 and place = 'Rome'; here: {', '.join(columns)}"[:200]
                asked.append(gr.Textbox("", label="Filter", info=over, max_length=MOST))
    read = gr.Textbox(label="The query as the model reads it", interactive=False, max_lines=3)
    found = gr.Gallery(show_label=False, height="auto", buttons=[], interactive=False)
    box.submit(sessions.search, asked, [found, read], **MODEL)


def _point(pointing: Pointing) -> None:
    gr.Markdown("Add an image and say what is meant in it: Octopus points at it. Thin boxes are what else it considered.")
    box = _message_box("an image, and: the small star left of the ring", 1)
    said = gr.Textbox(label="Answer", interactive=False)
    shown = gr.Image(show_label=False, interactive=False, buttons=[], height="60vh")
    box.submit(pointing.point, box, [shown, said], **MODEL)
