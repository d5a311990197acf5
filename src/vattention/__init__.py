"""vattention: an LLM serving engine whose KV cache is contiguous in virtual memory."""
