"""From a folder of images to batches of cached latents and text embeddings."""
