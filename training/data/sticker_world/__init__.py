"""Sticker World: a made-up data set of real nouns, drawn from emoji and textures, with exact panoptic masks."""
