"""The boxes of the paper's figure 2, one file each; :class:`training.models.odise.Odise` composes them."""
