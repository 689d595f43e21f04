# As much of nixpkgs' lib as the module under test uses, written for the test: the machine has no nixpkgs.
#
# Definitions of one option merge as NixOS merges them: conditions and priorities apply at every level of a set, lists
# are joined, and two values that differ are an error.
let
  inherit (builtins)
    all
    attrNames
    concatLists
    concatMap
    concatStringsSep
    elemAt
    filter
    foldl'
    head
    isAttrs
    isFunction
    isList
    isPath
    isString
    length
    listToAttrs
    mapAttrs
    match
    replaceStrings
    stringLength
    substring
    ;

  kind = value: if isAttrs value then value._type or "" else "";
  unique = foldl' (seen: name: if builtins.elem name seen then seen else seen ++ [ name ]) [ ];
  minimum = foldl' (a: b: if a < b then a else b) 9999;
  isStringLike = value: isString value || isPath value || value ? outPath;
in
rec {
  mkOption = fields: fields // { _type = "option"; };
  mkEnableOption =
    what:
    mkOption {
      type = types.bool;
      default = false;
      description = "Whether to enable ${what}.";
    };
  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkMerge = contents: {
    _type = "merge";
    inherit contents;
  };
  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };
  mkDefault = mkOverride 1000;
  mkForce = mkOverride 50;
  literalExpression = text: { inherit text; };

  inherit (builtins) concatMap;
  optional = condition: value: if condition then [ value ] else [ ];
  hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
  escapeShellArg =
    value:
    let
      text = toString value;
    in
    if match "[[:alnum:],._+:@%/-]+" text != null then text else "'${replaceStrings [ "'" ] [ "'\\''" ] text}'";
  escapeShellArgs = values: concatStringsSep " " (map escapeShellArg values);
  getExe = package: "${package}/bin/${package.meta.mainProgram}";
  importTOML = file: fromTOML (builtins.readFile file);
  licenses.asl20 = "Apache-2.0";
  platforms.linux = [ "x86_64-linux" ];
  fileset = {
    unions = files: files;
    toSource = { root, fileset }: { inherit root fileset; };
  };

  types = {
    anything.check = _: true;
    bool.check = builtins.isBool;
    str.check = isString;
    path.check = value: isStringLike value && hasPrefix "/" (toString value);
    port.check = value: builtins.isInt value && value >= 0 && value < 65536;
    package.check = value: value ? outPath;
    nullOr = type: { check = value: value == null || type.check value; };
    listOf = type: { check = value: isList value && all type.check value; };
    attrsOf = type: { check = value: isAttrs value && all (name: type.check value.${name}) (attrNames value); };
    submodule = _: types.anything;
  };

  # The definitions a value stands for, each with its priority.
  discharge =
    priority: value:
    {
      merge = concatMap (discharge priority) value.contents;
      "if" = if value.condition then discharge priority value.content else [ ];
      override = discharge value.priority value.content;
    }
    .${kind value} or [ { inherit priority value; } ];

  mergeAll =
    where: definitions:
    let
      best = minimum (map (each: each.priority) definitions);
      chosen = map (each: each.value) (filter (each: each.priority == best) definitions);
      sets = all (value: isAttrs value && !(value ? outPath)) chosen;
      defined =
        name: concatMap (value: if value ? ${name} then discharge best value.${name} else [ ]) chosen;
      names = filter (name: defined name != [ ]) (unique (concatMap attrNames chosen));
    in
    if sets then
      listToAttrs (
        map (name: {
          inherit name;
          value = mergeAll "${where}.${name}" (defined name);
        }) names
      )
    else if all isList chosen then
      concatLists chosen
    else if length chosen == 1 || all (value: value == head chosen) chosen then
      head chosen
    else
      throw "${where} has definitions that contradict each other";

  # Conditions are carried inwards, so that the names of options are known before any condition is looked at.
  pushed =
    value:
    {
      merge = concatMap pushed value.contents;
      "if" = map (mapAttrs (_: mkIf value.condition)) (pushed value.content);
      override = map (mapAttrs (_: mkOverride value.priority)) (pushed value.content);
    }
    .${kind value} or [ value ];

  evalOptions =
    where: options: definitions:
    if kind options == "option" then
      let
        given = concatMap (discharge 100) definitions;
        defaults = optional (options ? default) {
          priority = 1500;
          value = options.default;
        };
        value = mergeAll where (given ++ defaults);
      in
      if given ++ defaults == [ ] then
        throw "${where} is used but not defined"
      else if options.type.check value then
        value
      else
        throw "${where} is not of its type"
    else
      let
        values = concatMap pushed definitions;
        unknown = filter (name: !(options ? ${name})) (concatMap attrNames values);
      in
      if unknown != [ ] then
        throw "${where}.${head unknown} does not exist"
      else
        mapAttrs (
          name: below:
          evalOptions "${where}.${name}" below (concatMap (value: optional (value ? ${name}) value.${name}) values)
        ) options;

  evalModules =
    { modules }:
    let
      arguments = {
        inherit config;
        lib = import ./lib.nix;
      }
      // foldl' (found: module: found // (module._module.args or { })) { } (filter isAttrs modules);
      load =
        module:
        let
          read = if isPath module || isString module then import module else module;
          called = if isFunction read then read arguments else read;
          whole = if called ? options || called ? config then called else { config = called; };
          own = {
            key = if isPath module then toString module else null;
            options = whole.options or { };
            config = removeAttrs (whole.config or { }) [
              "imports"
              "_module"
            ];
          };
        in
        concatMap load (called.imports or [ ]) ++ [ own ];
      # A file that two others import counts once.
      once = foldl' (
        seen: each: if each.key != null && builtins.any (other: other.key == each.key) seen then seen else seen ++ [ each ]
      ) [ ];
      loaded = once (concatMap load modules);
      joined =
        a: b: a // mapAttrs (name: value: if a ? ${name} && kind value == "" then joined a.${name} value else value) b;
      config = evalOptions "config" (foldl' joined { } (map (each: each.options) loaded)) (map (each: each.config) loaded);
    in
    {
      inherit config;
    };
}
