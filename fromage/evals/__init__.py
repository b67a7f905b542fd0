"""Evaluations: one benchmark, one file, each `evaluate(model, data, options) -> Report`.

FROMAGe: coco (and Flickr30k), vist, visdial, circo, cirr, fashion_iq, genecis, chatir, few_shot. Octopus: refcoco, pope,
instructions. What they share is in fromage.evals.base and fromage.evals.contextual; what a report holds, and how it is
printed, in fromage.evals.report.
"""
