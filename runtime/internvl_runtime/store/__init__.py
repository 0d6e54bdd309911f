"""What builders write and servers read: cache layout, keys, manifests, publishing."""
