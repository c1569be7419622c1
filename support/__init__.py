"""What every room uses: errors with a cure, JSON, devices, progress, tensors in files, charts."""
