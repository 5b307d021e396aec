"""Networks in torch: the U-Net and the consistency function around it."""
