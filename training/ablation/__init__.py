"""The paper's claims, measured: variants of the model trained with one budget and compared in one table."""
