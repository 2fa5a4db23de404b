"""Shared by the attention ops: the call and its checks, the blocked XLA path, the merge of parts, and cases."""
