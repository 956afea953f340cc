"""Texts to embeddings: prepare (texts to ids), plan (which texts share a pass), execute, and rows in order.

It knows no encoder class and no files. The parts: `stream.encode_pairs` is the loop; `replica` is the model it runs,
`network` one forward pass, `cores` and `executor` where passes run, `locks` who may change a model and when.
"""
