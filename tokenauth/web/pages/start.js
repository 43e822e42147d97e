// Addresses are relative, so that the page also works below a prefix of a reverse proxy.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#description",
  deepLinking: true,
  displayRequestDuration: true,
  docExpansion: "none",
  validatorUrl: null, // it would be asked at another host
});
