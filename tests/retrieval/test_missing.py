from fromage.data.image_source import Item
from fromage.retrieval.missing import look


def test_files_are_looked_for_and_addresses_are_not(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").touch()
    (tmp_path / "out.jpg").touch()
    (tmp_path / "in" / "link.jpg").symlink_to(tmp_path / "out.jpg")
    (tmp_path / "in" / "0.tar").touch()
    names = ["in/a.jpg", "in/link.jpg", "in/gone.jpg", "out.jpg", "in/../out.jpg", "in/0.tar#k", "in/1.tar#k"]
    items = [*(Item(f"{tmp_path}/{name}") for name in names), Item("https://images.example/a.jpg"), Item("/nul\0l.jpg")]
    found = look(items, None)
    assert found.checked == 8 and found.outside == []
    assert found.gone == [f"{tmp_path}/in/gone.jpg", f"{tmp_path}/in/1.tar#k", "/nul\0l.jpg"]
    found = look(items, str(tmp_path / "in"))
    assert found.outside == [f"{tmp_path}/{name}" for name in ("in/link.jpg", "out.jpg", "in/../out.jpg")]


def test_what_is_said_is_one_line_that_names_three():
    items = [Item(f"/gone/{i}.jpg") for i in range(5)]
    said = look(items, None).said("INDEX", 5, True)
    named = "/gone/0.jpg, /gone/1.jpg, /gone/2.jpg, ..."
    assert said == f"INDEX: 5 of 5 images are missing ({named}); name the folder they are in with --images"
    assert "5 looked at, of 9,000," in look(items, None).said("INDEX", 9000, True)
    said = look(items, "/elsewhere").said("INDEX", 5, False)
    assert "not built here" in said and "--images" in said and "fromage index trust INDEX" in said
    assert look([], None).said("INDEX", 0, True) == ""
