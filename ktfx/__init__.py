"""ktfx: a torch.compile backend that runs Mixture-of-Experts models over GPUs and host by rules in a YAML file."""
