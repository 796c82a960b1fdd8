"""What a run will need, counted from its config: operations (`flops`), memory (`memory`), GPUs
(`hardware`), and how well that holds (`validate`)."""
