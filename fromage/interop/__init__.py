"""FROMAGe where people already are: as a module of other libraries."""
