"""How much of a KV cache's memory holds tokens: the memory managers of this project on one scheduler.

The tables of PagedAttention (arXiv 2309.06180, figures 2, 13, 15 and 16) and of vAttention (arXiv 2405.04437,
section 7.4) on this machine. Lengths and arrivals are drawn (`trace`), forwards are simulated (`device`) or live
(`live`), and the engine, its scheduler and the managers are the ones that serve.
"""
