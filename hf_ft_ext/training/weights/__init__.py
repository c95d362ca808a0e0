"""In which number format the weights of a model are, and on which devices and processes they lie."""
