"""Training of soft compressors: recipe -> samples -> losses -> loop."""
