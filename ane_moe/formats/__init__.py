"""Weight formats: how a matrix is stored in fewer bits, and which matrix gets which format."""
