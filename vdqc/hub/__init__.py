"""What joins vdqc to diffusers: whole pipelines in, artifacts that diffusers loads and saves."""
