"""The sections of the GPU suite. Each has `rows(context)`, which yields one dictionary a finding as it is made."""
