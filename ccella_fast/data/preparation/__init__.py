"""`ccella-fast prepare`: from studies to arrays, text features and latents on disk."""
