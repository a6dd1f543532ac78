"""What a checkpoint's latents are worth: changed, left out, looked up and looked at."""
