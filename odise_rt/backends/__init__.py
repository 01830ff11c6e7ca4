"""Inference engines: one file each, behind the Stage protocol of base.py."""
