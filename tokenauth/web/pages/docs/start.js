// Where a token may be left out ("{}"), Swagger UI shows the closed lock of a login from the beginning.
const openLocks = () => ({
  statePlugins: {
    auth: {
      wrapSelectors: {
        isAuthorized: (original) => (state, ways) => original(ways?.filter((way) => way.size > 0)),
      },
    },
  },
});

// An operation has up to ten refusals, all of one form: each shows its text, and its example when it is opened.
const foldRefusals = () => ({
  wrapComponents: {
    response: (Response, { React, getComponent }) => (answer) => {
      if (Number(answer.code) < 400) return React.createElement(Response, answer);
      const [create, text] = [React.createElement, answer.response.get("description")];
      const example = create(Response, { ...answer, response: answer.response.set("description", "") });
      return create("tr", { className: "response", "data-code": answer.code }, [
        create("td", { className: "response-col_status", key: "status" }, answer.code),
        create("td", { className: "response-col_description", key: "text" }, [
          create(getComponent("Markdown", true), { source: text, key: "text" }),
          create("details", { key: "example" }, [
            create("summary", { key: "summary" }, "Example"),
            create("table", { key: "table" }, create("tbody", null, example)),
          ]),
        ]),
      ]);
    },
  },
});

// Addresses are relative, so that the page also works below a prefix of a reverse proxy.
const ui = SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#description",
  deepLinking: true,
  displayRequestDuration: true,
  docExpansion: "none",
  plugins: [openLocks, foldRefusals],
  validatorUrl: null, // it would be asked at another host
  onComplete: () => ui.layoutActions.show(["operations-tag", "Token"], true), // the text at the top begins there
});
