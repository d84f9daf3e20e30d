"""Pure algebra of task vectors: functions of tensors, no files, no Ray."""
