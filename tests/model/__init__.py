"""What lies directly in `pdx/`: the configuration, the model, quantization, meshes and sharding."""
