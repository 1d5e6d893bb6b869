"""A small trained ColQwen3 and the page sets it is measured on."""
