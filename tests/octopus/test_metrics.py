"""How well an answer points, by its boxes and by the head's."""

from fromage.octopus.answers import GroundedAnswer
from fromage.octopus.metrics import box_metrics, mean_percent

A, B, FAR = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0), (0.9, 0.0, 1.0, 0.1)


def test_the_heads_recall_grows_with_its_candidates():
    candidates = [(FAR, 0.9), (FAR, 0.8), (A, 0.7), (B, 0.6)]
    found = box_metrics(GroundedAnswer("", [B], candidates), [A])
    assert [found[f"head_recall_top{k}"] for k in range(1, 6)] == [0, 0, 1, 1, 1]
    assert found["head_iou"] == found["acc_iou50"] == found["mean_iou"] == 0
    sixth = box_metrics(GroundedAnswer("", [A], [(FAR, 0.9)] * 5 + [(A, 0.1)]), [A])
    assert sixth["head_recall_top5"] == 0 and sixth["acc_iou50"] == 1


def test_the_answer_stands_beside_the_head():
    names = list(box_metrics(GroundedAnswer("", [A], [(A, 0.9)]), [A]))
    assert names == ["acc_iou50", *(f"head_recall_top{k}" for k in range(1, 6)), "mean_iou", "head_iou", "all_found"]
    assert not any("head" in name for name in box_metrics(GroundedAnswer("", [A]), [A]))
    assert mean_percent([{"acc_iou50": 1.0}, {"acc_iou50": 0.0}, {"words": 1.0}]) == {"acc_iou50": 50, "words": 100}


def test_boxes_in_another_order_are_all_found_and_not_in_order():
    boxes = [(0.0, 0.0, 0.2, 0.2), (0.5, 0.5, 0.9, 0.9)]
    for said, figures in ((boxes, (1, 1)), (boxes[::-1], (1, 0)), (boxes[:1], (0, 0))):
        found = box_metrics(GroundedAnswer("", list(said)), boxes)
        assert (found["all_found"], found["in_order"]) == figures
    assert "in_order" not in box_metrics(GroundedAnswer("", boxes[:1]), boxes[:1])
