"""Quality of predictions: panoptic quality, mean IoU, mask AP."""
