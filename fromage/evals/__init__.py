"""Evaluations: one benchmark, one file, each `evaluate(model, data, options) -> Report`.

FROMAGe: coco (and Flickr30k), vist, visdial, few_shot. Octopus: refcoco, pope, instructions. What they share is in
fromage.evals.base; what a report holds, and how it is printed, in fromage.evals.report.
"""
