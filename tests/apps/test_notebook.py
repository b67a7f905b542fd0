"""The chat widget of notebooks: a turn by its button, images both ways, errors on the page, undo."""

import io
from datetime import UTC, datetime

import pytest
from PIL import Image

pytest.importorskip("ipywidgets")

from fromage.apps.notebook import SIDE, NotebookChat
from fromage.generation.chat import Chat
from fromage.generation.options import Decoding


@pytest.fixture(scope="module")
def caption():
    return "a <b>red</b> one"


def upload(page, content):
    """As the browser hands a file over."""
    file = {"name": "a.png", "type": "image/png", "size": len(content), "content": memoryview(content)}
    page.upload.value = (file | {"last_modified": datetime.now(UTC)},)


def png(colour, side=32):
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def words(page):
    """All text on the page."""

    def within(widget):
        return (
            [widget.value]
            if hasattr(widget, "placeholder")
            else [t for c in getattr(widget, "children", ()) for t in within(c)]
        )

    return "\n".join(within(page.said))


def test_a_turn_has_what_was_sent_and_what_came_back(model, index):
    page = NotebookChat(Chat(model, index, Decoding(max_new_tokens=6, ret_bias=1e4)))
    page.line.value = "a <i>star</i>"
    upload(page, png("blue"))
    page.send.click()
    (turn,) = page.chat.turns
    assert isinstance(turn.said[0], Image.Image) and turn.said[1:] == ["a <i>star</i>"] and turn.answer.shown
    assert "a &lt;i&gt;star" in words(page) and "&lt;b&gt;red" in words(page), "text is text, not markup"
    assert page.line.value == "" and page.upload.value == () and not page.send.disabled
    page.undo.click()
    page.undo.click()
    assert page.chat.turns == [] and page.said.children == ()


def test_no_image_goes_into_the_page_at_full_size(model):
    page = NotebookChat(Chat(model, decoding=Decoding(max_new_tokens=2)))
    upload(page, png("blue", side=1000))
    page.send.click()
    assert max(Image.open(io.BytesIO(page.said.children[0].value)).size) == 2 * SIDE
    assert page.chat.turns[0].said[0].size == (1000, 1000)


def test_the_answer_is_shown_whole(model):
    page = NotebookChat(Chat(model, decoding=Decoding(max_new_tokens=6, max_images=0)))
    page.line.value = "a star"
    page.send.click()
    assert page.chat.turns[0].answer.text in words(page)


def test_where_there_is_no_image_it_says_so(model):
    page = NotebookChat(Chat(model, decoding=Decoding(max_new_tokens=2, ret_bias=1e4)))
    page.line.value = "a star"
    page.send.click()
    assert "[an image; there is no index" in words(page)


def test_errors_stand_on_the_page_and_the_line_stays(model):
    page = NotebookChat(Chat(model, decoding=Decoding(max_new_tokens=6)))
    page.send.click()
    assert page.said.children == (), "nothing was said"
    upload(page, b"no image")
    page.send.click()
    assert "undecodable image" in words(page) and page.chat.turns == []
    page.upload.value, page.line.value = (), "a star " * 600
    page.send.click()
    assert "shorten it" in words(page) and page.line.value and not page.send.disabled
