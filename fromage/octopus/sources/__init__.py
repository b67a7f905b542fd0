"""Readers of data sets in their published files, one file per data set.

Boxes are clipped to the image. Boxes without area are left out, and so are examples that point at them; both are counted,
and faults are warned of once.
"""

from fromage.octopus.sources.coco import CocoObjects as CocoObjects
from fromage.octopus.sources.file_source import FileSource as FileSource
from fromage.octopus.sources.file_source import check_question as check_question
from fromage.octopus.sources.flickr30k import Flickr30kEntities as Flickr30kEntities
from fromage.octopus.sources.flickr30k import Flickr30kSpotting as Flickr30kSpotting
from fromage.octopus.sources.instructions import Instructions as Instructions
from fromage.octopus.sources.pope import Pope as Pope
from fromage.octopus.sources.refcoco import RefCOCO as RefCOCO
from fromage.octopus.sources.visual_genome import VisualGenome as VisualGenome
