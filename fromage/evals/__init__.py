"""Evaluations: one benchmark, one file, each `evaluate(model, data, options) -> Report`.

Where to look:

    coco                COCO and Flickr30k, captions and images find each other; eccv: what else belongs together
    vist, visdial       stories and dialogues: the paper's two benchmarks; scores keeps those of VisDial's answers
    circo, cirr, fashion_iq, genecis    composed retrieval; what they share is in composed
    chatir              images found by dialogues
    few_shot            learning from examples in the prompt
    answers             answers of FROMAGe or Octopus into an answer_file for official scorers; vqa judges them
    refcoco, pope, instructions         Octopus' benchmarks; predict runs it over their data
    caption_sets, dialogues, questions  readers of published files that several benchmarks take
    captioning          generated captions compared with those of people
    retrieval           recall on validation batches; coco_lightning: COCO as a test run of Lightning
    base                what the benchmarks share, CLIP's baseline too, and what a report holds
    contextual          queries, galleries, right items
    options             how an evaluation runs
    report              reports printed
"""
