"""Images that come with requests: parts of bodies, URLs and hosts, fetching, and what the journal keeps."""
