"""What the attention ops share: the call and its checks, the blocked XLA path, the merge of parts, shapes of cases."""
