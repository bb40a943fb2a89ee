"""A request becomes a plan: tokens, resized images, guidance branches."""
